"""A tour of the whole program on synthetic cells: counts, vocabulary, tokens, an encoder, embeddings, cell types."""
