"""The rules by which counts become values, a file for each family that has such rules."""
