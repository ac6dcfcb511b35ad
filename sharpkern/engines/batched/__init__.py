"""Losses of several step sizes in one call of the closure."""
