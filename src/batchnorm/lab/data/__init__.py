"""Training data: tables from files and built-in data sets, columns turned into features, the split."""
