"""Relative critical sharpness for many mixes of data."""
