"""Trained models of the user: loading them, and testing them for covariate shift."""
