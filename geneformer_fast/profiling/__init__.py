"""How fast something runs, how far that is from what the machine can do, and what to change."""
