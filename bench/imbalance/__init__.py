"""Unequal classes: Geneformer, scGPT and scBERT side by side, one class of the training cells cut, beside PCA."""
