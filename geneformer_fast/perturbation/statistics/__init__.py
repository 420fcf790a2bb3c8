"""What perturbations say of genes: the official tables, and what stands beside them."""
