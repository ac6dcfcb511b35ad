"""Ranks and shards: who belongs together, what each holds, and failures that all of them hear of."""
