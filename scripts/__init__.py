"""One job each: python -m scripts.NAME --help."""
