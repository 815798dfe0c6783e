"""The worked example of one neuron, as text and as an interactive page."""
