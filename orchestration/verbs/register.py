"""`latentzoom register`: a bundle becomes a new version of a registered model, with alias `candidate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipeline.command_line import parse, plain_help
from pipeline.common_options import answer


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check a bundle, log it as an MLflow model and register it."""

    bundle: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    """A folder or URL that `latentzoom train`, `import` or `demo` made; or the starter: starter:faithful,
    starter:sharp."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the registered model."""
    report: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """report.json of `latentzoom evaluate`; `promote` weighs its figures."""
    data: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Shard set that the model was trained on."""
    run_id: Annotated[str, tyro.conf.arg(metavar="ID")] = ""
    """MLflow run that made the bundle; without it a new run."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store; without it MLFLOW_TRACKING_URI, else ./mlflow.db."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom register")
    from orchestration import registry
    from orchestration.evaluation.data import check_encoder
    from orchestration.evaluation.report import load_report
    from pipeline import storage
    from pipeline.bundle import missing_parts
    from pipeline.starter import starter_or
    from preprocess.manifest import load_manifest

    dataset = None
    if arguments.data:
        manifest = load_manifest(arguments.data)
        own = storage.read_json(storage.join(starter_or(arguments.bundle), "config.json")).get("autoencoder_identity")
        check_encoder(arguments.data, manifest.autoencoder_identity, str(own))
        dataset = (storage.absolute(arguments.data), manifest.digest)
    version = registry.register(
        arguments.bundle,
        arguments.name,
        tracking_uri=arguments.tracking_uri or None,
        run_id=arguments.run_id or None,
        report=load_report(arguments.report).to_dict() if arguments.report else None,
        dataset=dataset,
    )
    digest = version.tags["latentzoom.bundle_digest"]
    missing = missing_parts(version.tags["latentzoom.task"], version.tags["latentzoom.parts"].split(", "))
    answer(
        f"{version.uri}  alias {registry.CANDIDATE}  bundle {digest[:12]}",
        {"model": version.uri, "alias": registry.CANDIDATE, "bundle_digest": digest, "missing": missing},
    )
    if missing:
        print(f"note: it has no {' and no '.join(missing)}, so it cannot be promoted")
    return 0
