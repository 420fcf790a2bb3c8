"""The embedding front: table lookups, layer normalisation and dropout in one pass."""
