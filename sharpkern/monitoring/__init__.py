"""Measurements in a training loop, their history and their picture."""
