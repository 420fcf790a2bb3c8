"""Models with weights of eight bits: what becomes of each layer, and making it so."""
