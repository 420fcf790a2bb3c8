"""Bidirectional attention within each cell of a packed batch."""
