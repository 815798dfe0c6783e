"""The arithmetic of batch normalization, one file a way of computing it."""
