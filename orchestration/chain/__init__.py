"""Resumable chains of steps: keys by content, one job a folder, redoing."""
