"""Calls of the closure: repeatable, in the right precision, and without a trace."""
