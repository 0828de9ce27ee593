"""`latentzoom doctor`: checks a machine or a cluster; every trouble with what to do, in one line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.command_line import Device, Flag, Repeated, parse, plain_help
from pipeline.common_options import answer, did_you_mean
from pipeline.errors import UserError


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check versions, devices, disk, shared memory, tokens, storage, tracking server, clock, cluster. Exit status 0:
    nothing will fail; 1: some line says TROUBLE."""

    storage: Annotated[Repeated, tyro.conf.arg(metavar="URL")] = ()
    """Write, read and delete a file there. May be given several times."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow server to ask; without it MLFLOW_TRACKING_URI where that is set."""
    address: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """Head of a cluster to ask, http://HEAD:8265."""
    nodes: Flag = False
    """Check every node of the cluster that RAY_ADDRESS names; as a job: latentzoom submit doctor --nodes."""
    gpu: Flag = False
    """Check everything that only a GPU can show, in ten minutes on one card: kernels, every stage by each engine,
    sampling, decoding, speed; nothing else is checked then."""
    device: Device = ""
    """Of --gpu: cuda, cuda:1, without it cuda; cpu is a rehearsal."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "gpu"
    """Of --gpu: gpu.json and gpu.md go here."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART,...")] = ()
    """Of --gpu: these parts."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom doctor")
    if arguments.gpu:
        return _check_gpu(arguments)
    if alone := [name for name in ("only", "device", "out") if getattr(arguments, name) != getattr(Arguments, name)]:
        raise UserError(f"--{alone[0]} is an option of --gpu; give --gpu too, or leave it out")
    from orchestration.doctor import machine, servers

    found = machine.machine(arguments.storage)
    if uri := arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", ""):
        found += servers.tracking_server(uri)
    if arguments.address:
        found += servers.head(arguments.address)
    if arguments.nodes:
        found += servers.nodes(arguments.storage)
    num = sum(finding.level == "trouble" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    lines = [*(finding.line() for finding in found), f"{num} troubles, {warnings} warnings, {len(found)} checks"]
    answer("\n".join(lines), {"troubles": num, "warnings": warnings, "findings": found})
    return 1 if num else 0


def _check_gpu(arguments: Arguments) -> int:
    from orchestration.doctor import gpu

    names = [part.name for part in gpu.PARTS]
    if unknown := [name for name in arguments.only if name not in names]:
        near = did_you_mean(unknown[0], names)
        raise UserError(f"no part {', '.join(unknown)}{near}; use {', '.join(names)}")
    folder = Path(arguments.out)
    outcomes = gpu.check(arguments.device or "cuda", folder, only=arguments.only)
    failed = [outcome.name for outcome in outcomes if outcome.state in gpu.BAD]
    text = f"{len(outcomes)} parts, failed: {', '.join(failed) or 'none'}; {folder / 'gpu.md'}, {folder / 'gpu.json'}"
    answer(text, {"parts": outcomes, "failed": failed, "out": folder})
    return 1 if failed else 0
