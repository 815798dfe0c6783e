"""Batch normalization fused with the activation and the addition that follow it."""
