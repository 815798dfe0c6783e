"""Frozen batch normalization folded into the layer before it, in every forward."""
