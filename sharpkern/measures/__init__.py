"""Numbers made of losses: critical, relative, directional and Hessian sharpness."""
