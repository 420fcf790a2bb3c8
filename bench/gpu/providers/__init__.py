"""Problems of the cases on a card, a file per kind: the inputs, what is true, and everyone who computes it."""
