"""What a job would take, by a model fitted to committed measurements."""
