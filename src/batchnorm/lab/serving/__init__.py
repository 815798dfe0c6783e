"""A trained model that serves predictions, and tests for a shift of the data that it is given."""
