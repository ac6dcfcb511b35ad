"""Where Δθ comes from: an optimizer's next step, gradients, a step that was taken, or tensors."""
