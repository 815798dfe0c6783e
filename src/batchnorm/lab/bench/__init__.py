"""Benchmark: kernels and whole models against torch's own, on this machine."""
