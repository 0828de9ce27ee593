"""`latentzoom train`: training/cli.py with Ray Train workers behind it."""

from __future__ import annotations

from training import cli


def main(argv: list[str]) -> int:
    """Train one stage, in this process with --local or on Ray Train workers."""
    from orchestration.ray_train import launch

    return cli.main(argv, launch=launch)
