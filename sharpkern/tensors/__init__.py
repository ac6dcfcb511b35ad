"""Tensors alone: what memory they are in, what they look like without values, and random numbers."""
