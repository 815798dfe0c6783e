"""Presentation of a comparison: the HTML report with its figures, and the tables of the terminal."""
