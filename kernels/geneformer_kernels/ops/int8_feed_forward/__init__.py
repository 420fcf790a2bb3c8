"""The feed-forward half of a block with int8 weights."""
