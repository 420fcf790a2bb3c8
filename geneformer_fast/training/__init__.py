"""Training: recipes, the loop, checkpoints, several processes, and pretraining on masked genes."""
