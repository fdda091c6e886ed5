"""The terms of the objective; each takes tensors, returns this rank's share of a loss over the global batch."""
