"""What `latentzoom serve` can be asked for. Light, so that its help comes at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.command_line import Device, Flag, Repeated, plain_help
from pipeline.errors import require_range


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

    def __post_init__(self) -> None:
        require_range(self, 0, (1 << 16) - 1, "port")
        require_range(self, 0, 1e6, "hours", "memory", is_open=True)
        require_range(self, 0, 4096, "threads", "gpus_per_replica", "cpus_per_replica")
