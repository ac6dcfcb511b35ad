"""Where a direction comes from: an optimizer's formula or a step on its copy, two sets of weights, given tensors."""
