"""The command line: geneformer-fast COMMAND ..."""
