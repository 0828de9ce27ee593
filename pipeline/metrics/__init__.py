"""Figures of merit as pure functions on arrays, and what makes them streaming and mergeable. Pictures are uint8."""
