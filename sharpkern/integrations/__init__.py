"""The Monitor in training loops that are not yours: Transformers, Lightning, Accelerate. Each needs its extra."""
