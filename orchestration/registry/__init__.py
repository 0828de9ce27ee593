"""Registered models: versions, aliases, promotion, cards, lineage, and the cache of their bundles."""
