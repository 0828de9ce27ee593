"""Shards of samples: written, published, verified; read, cached, ordered and loaded."""
