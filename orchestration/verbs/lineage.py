"""`latentzoom lineage`: where a registered model comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command_line import parse, plain_help
from pipeline.common_options import answer


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Print code, environment, data, encoder, stages, figures and decisions behind a version. Exit status 1: its
    bundle is lost."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """models:/NAME@alias or models:/NAME/VERSION."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store; without it MLFLOW_TRACKING_URI, else ./mlflow.db."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom lineage")
    from orchestration.lineage import is_usable, lineage

    fields = lineage(arguments.model, tracking_uri=arguments.tracking_uri or None)
    width = max(len(key) for key in fields)
    answer("\n".join(f"{key:{width}}  {value}" for key, value in fields.items()), fields)
    return 0 if is_usable(fields) else 1
