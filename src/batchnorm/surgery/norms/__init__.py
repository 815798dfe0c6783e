"""The formula of a batch normalization layer of any library."""
