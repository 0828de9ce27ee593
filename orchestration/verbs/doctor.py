"""`latentzoom doctor`: checks a machine or a cluster; every trouble with what to do, in one line."""

from __future__ import annotations

import argparse
import os


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
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
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
