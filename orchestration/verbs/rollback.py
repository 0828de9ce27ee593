"""`latentzoom rollback`: the alias `champion` goes back to the version that had it before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command_line import parse, plain_help
from pipeline.common_options import answer


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Undo the last promotion."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Registered model."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store; without it MLFLOW_TRACKING_URI, else ./mlflow.db."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom rollback")
    from orchestration import registry

    version = registry.rollback(arguments.name, tracking_uri=arguments.tracking_uri or None)
    answer(f"champion is {version.uri} again", {"champion": version.uri})
    return 0
