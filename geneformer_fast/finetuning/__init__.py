"""Fine-tuning: classes of cells, classes of genes, several tasks at once; folds, losses, samplers, scores, search."""
