"""Networks trained side by side in stacks, and the record that each run leaves."""
