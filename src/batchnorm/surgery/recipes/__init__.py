"""Groups of parameters, residual branches that begin at zero, and the optimizer after surgery."""
