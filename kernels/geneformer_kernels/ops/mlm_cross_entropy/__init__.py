"""The decoder and the loss of masked gene prediction, without the logits."""
