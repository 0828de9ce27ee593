"""Training runs of a folder or of a tracking store: how far they are, and their curves."""
