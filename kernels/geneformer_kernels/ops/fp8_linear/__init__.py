"""A linear layer with float8 weights."""
