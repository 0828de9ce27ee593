"""`latentzoom preprocess`: preprocess/cli.py, with its figures as Ray metrics where Ray runs. Registered models are
encoders too: `--autoencoder models:/NAME@champion`."""

from __future__ import annotations

from orchestration.cluster.ray_metrics import PreprocessingMetrics
from preprocess import cli


def main(argv: list[str]) -> int:
    """Make, check, move or verify shards."""
    return cli.main(argv, PreprocessingMetrics(), _bundle_of)


def _bundle_of(name: str) -> str:
    """The folder of the bundle that a name of the registry, or of the starter, stands for; other places stay."""
    from orchestration.registry import versions as registry

    return str(registry.resolve(name)) if name.startswith(("models:/", "starter:")) else name
