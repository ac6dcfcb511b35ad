"""Losses with weights that are formed where they are read; θ is never written."""
