"""For developers without a GPU: python -m tools.count --help."""
