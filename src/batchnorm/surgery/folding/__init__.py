"""Batch normalization folded into the weights of its neighbors, for inference."""
