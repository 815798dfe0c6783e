"""The arithmetic of batch normalization; each way of computing it has a file."""
