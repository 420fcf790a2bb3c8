"""Linear attention over packed cells by positive random features."""
