"""Batch normalization layers taken from Keras and Flax, and back."""
