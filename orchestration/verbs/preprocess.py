"""`latentzoom preprocess`: preprocess/cli.py, with its figures as Ray metrics where Ray runs."""

from __future__ import annotations

from orchestration.ray_metrics import PreprocessingMetrics
from preprocess import cli


def main(argv: list[str]) -> int:
    """Make or verify shards."""
    return cli.main(argv, PreprocessingMetrics())
