"""What a measurement will take in memory: the engines' own code on tensors that take none."""
