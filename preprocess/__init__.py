"""Data sets: sources, plans, shards of latents and pixels, and the loader that reads them in an exact order."""
