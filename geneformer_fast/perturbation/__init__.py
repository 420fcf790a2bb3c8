"""In-silico perturbation: genes deleted, switched on or moved in rank, and what that does to a cell."""
