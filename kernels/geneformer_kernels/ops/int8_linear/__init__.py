"""A linear layer with int8 weights."""
