"""Residual addition and layer normalisation with an fp32 stream."""
