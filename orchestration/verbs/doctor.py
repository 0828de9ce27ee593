"""`latentzoom doctor`: checks a machine or a cluster; every trouble with what to do, in one line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pipeline.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="latentzoom doctor",
        description="Check versions, devices, disk, shared memory, tokens, storage, tracking server, clock, cluster. "
        "Exit status 0: nothing will fail; 1: some line says TROUBLE.",
    )
    add = parser.add_argument
    add(
        "--storage", action="append", default=[], metavar="URL", help="write, read and delete a file there (repeatable)"
    )
    add("--tracking-uri", default="", help="MLflow server to ask; default MLFLOW_TRACKING_URI when set")
    add("--address", default="", metavar="http://HEAD:8265", help="head of a cluster to ask")
    add("--nodes", action="store_true", help="check every node of the cluster that RAY_ADDRESS names; as a job: "
        "latentzoom submit doctor --nodes")  # fmt: skip
    add("--gpu", action="store_true", help="check everything that only a GPU can show, in ten minutes on one card: "
        "kernels, every stage by each engine, sampling, decoding, speed; nothing else is checked then")  # fmt: skip
    add("--device", default="", metavar="NAME", help="of --gpu: cuda, cuda:1 (default cuda); cpu is a rehearsal")
    add("--out", default="gpu", metavar="FOLDER", help="of --gpu: gpu.json and gpu.md go here (default: %(default)s)")
    add("--only", action="append", default=[], metavar="PART", help="of --gpu: this part (repeatable)")
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.gpu:
        return _check_gpu(arguments)
    from orchestration.doctor import machine, servers

    found = machine.machine(arguments.storage)
    if uri := arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", ""):
        found += servers.tracking_server(uri)
    if arguments.address:
        found += servers.head(arguments.address)
    if arguments.nodes:
        found += servers.nodes(arguments.storage)
    for finding in found:
        print(finding.line())
    num = sum(finding.level == "trouble" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    print(f"{num} troubles, {warnings} warnings, {len(found)} checks")
    return 1 if num else 0


def _check_gpu(arguments: argparse.Namespace) -> int:
    from orchestration.doctor import gpu

    names = [part.name for part in gpu.PARTS]
    if unknown := [name for name in arguments.only if name not in names]:
        raise UserError(f"no part {', '.join(unknown)}; use {', '.join(names)}")
    folder = Path(arguments.out)
    outcomes = gpu.check(arguments.device or "cuda", folder, only=tuple(arguments.only))
    failed = [outcome.name for outcome in outcomes if outcome.state in gpu.BAD]
    print(f"{len(outcomes)} parts, failed: {', '.join(failed) or 'none'}; {folder / 'gpu.md'}, {folder / 'gpu.json'}")
    return 1 if failed else 0
