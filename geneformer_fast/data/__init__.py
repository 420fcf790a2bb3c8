"""From token folders to batches: who is in a batch, what is masked, and reading ahead."""
