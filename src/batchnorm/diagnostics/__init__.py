"""What a batch normalization layer does to a batch, shown in numbers."""
