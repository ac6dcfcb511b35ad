"""What every room may lean on: optional packages, progress bars, whole files, figures."""
