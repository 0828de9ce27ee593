"""The work of `latentzoom export`: the model is found, written beside its place and put there whole."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from orchestration.export_arguments import Arguments
from orchestration.registry import versions as registry
from orchestration.registry.stored_bundle import bundle_digest
from orchestration.tracking import store as tracking
from pipeline import storage
from pipeline.bundle import Bundle, load_bundle
from pipeline.common_options import answer
from pipeline.errors import UserError
from pipeline.exporting.front_matter import Facts, Measured, is_exported
from training.evaluation.report import load_report

_STARTER = "starter:"


def run(arguments: Arguments) -> int:
    """Write what is asked for. `UserError` for a model that cannot be written so and a place that is taken."""
    _check_place(arguments.out, arguments.overwrite)
    write = _writer(arguments.to)
    store = arguments.tracking_uri or None
    found = registry.resolve(arguments.model, tracking_uri=store)
    bundle = load_bundle(str(found))
    facts = facts_of(arguments, bundle, bundle_digest(found), store)
    with tempfile.TemporaryDirectory(prefix="latentzoom-export-") as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        write(bundle, folder, facts)
        storage.replace_dir(folder, arguments.out, last="README.md")
    figures = f", {len(facts.measured)} figures" if facts.measured else ""
    licence = facts.licence or "unknown"
    answer(
        f"wrote {arguments.out}: {bundle.config.name} ({arguments.to}, licence {licence}{figures})",
        {"out": arguments.out, "name": bundle.config.name, "to": arguments.to, "licence": licence},
    )
    return 0


def _check_place(out: str, overwrite: bool) -> None:
    """`UserError` where `out` holds something, unless it is an export that may be replaced."""
    there = [name for name in storage.list_folder(out) if not name.startswith(".")]
    if not there:
        return
    card = storage.join(out, "README.md")
    if not (storage.exists(card) and is_exported(storage.read_bytes(card).decode(errors="replace"))):
        raise UserError(f"{out} holds {sorted(there)[0]!r}, which is no export; give a new folder")
    if not overwrite:
        raise UserError(f"{out} holds an export already; give a new folder, or replace it with --overwrite")


def _writer(to: str) -> Callable[[Bundle, Path, Facts], None]:
    if to == "hub-folder":
        from pipeline.exporting.hub_folder import write_hub_folder

        return write_hub_folder
    if to == "diffusers":
        from pipeline.exporting.diffusers_folder import write_diffusers_folder

        return write_diffusers_folder
    from pipeline.exporting.onnx_files import write_onnx

    return write_onnx


def facts_of(arguments: Arguments, bundle: Bundle, digest: str, store: str | None) -> Facts:
    """Licence and figures: those that are given, else those that the bundle, its registration or the starter name."""
    licence = arguments.licence or str(bundle.meta.get("licence", ""))
    if arguments.report:
        report = load_report(arguments.report).to_dict()
        if report["bundle_digest"] != digest:
            raise UserError(f"{arguments.report} measures another bundle than {arguments.model}; evaluate this one")
        return _of_report(report, licence)
    if arguments.model.startswith("models:/"):
        uri = tracking.tracking_uri(store)
        version = registry.require_version(*registry.parse_model_uri(arguments.model), uri)
        given = registry.stored_report(version, tracking_uri=uri)
        return _of_report(given, licence) if given is not None else Facts(licence=licence)
    if arguments.model == "starter" or arguments.model.startswith(_STARTER):
        return _of_starter(arguments.model.removeprefix(_STARTER).replace("starter", "faithful"), licence)
    return Facts(licence=licence)


def _of_report(report: Mapping[str, Any], licence: str) -> Facts:
    """Figures of the model itself; baselines stay in the report."""
    measured = [
        Measured(metric=f["name"], setting=f["setting"], value=float(f["value"]), protocol=f["protocol"])
        for f in report["figures"]
        if f["method"] == "ours"
    ]
    data = str(report.get("dataset") or str(report["data"]).rstrip("/").rsplit("/", 1)[-1])
    return Facts(licence=licence, data=data, measured=tuple(measured))


def _of_starter(look: str, licence: str) -> Facts:
    """What was measured of the weights that ship."""
    file = resources.files("orchestration") / "starter" / "figures.json"
    known = storage.read_json(str(file))
    names = {"PSNR, dB": "psnr_y", "LPIPS": "lpips"}
    measured = [
        Measured(metric=names[key], setting=re.sub("×", "x", row["scale"]), value=float(row[key]), protocol="benchmark")
        for row in known["figures"][look]
        for key in names
    ]
    return Facts(licence=licence, data="B100", measured=tuple(measured))
