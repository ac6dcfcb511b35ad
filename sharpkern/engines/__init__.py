"""Engines answer one question: the losses L(θ − ηΔθ) at given step sizes η. They know nothing of the search."""
