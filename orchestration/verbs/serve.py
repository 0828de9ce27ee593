"""`latentzoom serve`: a page where one drops a picture and zooms without end, and the HTTP interface under it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.command_line import Device, Flag, Repeated, parse, plain_help, with_settings
from pipeline.errors import UserError
from pipeline.progress import Notice

TOKEN_VARIABLE = "LATENTZOOM_SERVE_TOKEN"


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Open a page on this machine where pictures are dropped, zoomed into and saved at any size, and generated. Killed
    and started again, it has its pictures still."""

    model: Annotated[Repeated, tyro.conf.arg(metavar="MODEL")] = ()
    """What draws, besides the starter that comes along: a bundle folder or URL, or models:/NAME@champion. May be given
    several times; the first is chosen when the page opens."""
    host: Annotated[str, tyro.conf.arg(metavar="HOST")] = "127.0.0.1"
    """Where to listen. Other than this machine's own addresses need a token: LATENTZOOM_SERVE_TOKEN, or one is made."""
    port: int = 8000
    """0: any that is free."""
    keep: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where pictures are kept; without it `serve` in the cache (LATENTZOOM_CACHE)."""
    hours: float = 24.0
    """Until a picture that nobody asks for is removed."""
    memory: float = 2.0
    """GiB of latents and features, of all pictures together."""
    threads: int = 0
    """That draw; without it one a core, or two for a GPU."""
    open: Flag = False
    """Open the page in the browser."""
    device: Device = ""
    """cpu, cuda, cuda:1; without it CUDA where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks. bfloat16 suits recent GPUs; it changes pixels by a level or two."""
    address: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """Of a Ray cluster's job server, http://HEAD:8265: replicas there serve, by Ray Serve, at --port of every node."""
    on_ray: Flag = False
    """Start the replicas on the cluster that this process runs on, which is what --address has a job do."""
    replicas: Annotated[str, tyro.conf.arg(metavar="NUM|LEAST:MOST")] = "1"
    """On a cluster: how many; between two numbers they follow the load. Several need --keep on shared storage."""
    gpus_per_replica: float = 0.0
    """On a cluster. A part of a GPU is possible."""
    cpus_per_replica: float = 1.0
    """On a cluster."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store whose champions are offered too; without it MLFLOW_TRACKING_URI."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom serve")
    _check(arguments)
    if arguments.address:
        from orchestration.serving import submit

        return submit(arguments, without_address(with_settings(Arguments, argv, "latentzoom serve")))
    with Notice("latentzoom: starting") as notice:
        from orchestration.serving import run, run_on_ray

        token = os.environ.get(TOKEN_VARIABLE, "")
        return (run_on_ray if arguments.on_ray else run)(arguments, token, notice)


def without_address(argv: list[str]) -> list[str]:
    """The arguments for the cluster."""
    words = []
    skip = False
    for word in argv:
        if skip or word == "--address" or word.startswith("--address="):
            skip = word == "--address"
            continue
        words.append(word)
    return words


def _check(arguments: Arguments) -> None:
    if not 0 <= arguments.port < 1 << 16:
        raise UserError(f"--port {arguments.port} is not allowed; use 0 to 65535")
    for name, value in (("hours", arguments.hours), ("memory", arguments.memory)):
        if not value > 0:
            raise UserError(f"--{name} {value:g} is not allowed; use a positive number")
    if arguments.threads < 0:
        raise UserError(f"--threads {arguments.threads} is not allowed; use 1 or more")
