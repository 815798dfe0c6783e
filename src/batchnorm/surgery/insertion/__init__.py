"""Batch normalization put into networks that have none."""
