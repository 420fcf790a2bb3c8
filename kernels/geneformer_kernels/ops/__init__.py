"""One folder per operation, each with the same files: reference, plan, kernel, op."""
