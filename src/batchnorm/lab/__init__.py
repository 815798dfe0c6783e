"""The evidence: the same network without and with batch normalization, trained and compared on real data."""
