"""Diagnostics: the numbers of a layer's calculation, and what the library runs on."""
