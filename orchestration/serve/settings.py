"""What a server is told, in one place for a process of its own and for replicas on a cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.pictures.output import Dtype
from pipeline.storage import cache_folder

if TYPE_CHECKING:
    from orchestration.serve.server import Server


@dataclass(frozen=True, kw_only=True)
class Settings:
    """models: addresses, the first is the default. keep: folder of the pictures ("": in the cache). hours: until a
    picture that nobody asks for expires. memory: GiB of latents and features. threads: 0 is one a core, two for a GPU.
    store: MLflow store whose champions are offered, "" for none."""

    models: tuple[str, ...] = ()
    keep: str = ""
    hours: float = 24.0
    memory: float = 2.0
    threads: int = 0
    device: str = ""
    dtype: Dtype = "float32"
    store: str = ""

    def make_server(self) -> Server:
        """With the default model loaded. Raises `UserError`."""
        from orchestration.serve.catalogue import Catalogue
        from orchestration.serve.server import Limits, Server
        from orchestration.serve.shelf import Shelf
        from pipeline.reading import use_own_size_limit

        use_own_size_limit()
        limits = Limits(memory_bytes=int(self.memory * (1 << 30)), expiry_seconds=self.hours * 3600)
        catalogue = Catalogue(list(self.models), device=self.device, dtype=self.dtype, store=self.store)
        device = catalogue.get().model.device.type
        shelf = Shelf(
            Path(self.keep) if self.keep else cache_folder() / "serve",
            max_bytes=limits.disk_bytes,
            seconds=limits.expiry_seconds,
        )
        return Server(catalogue, shelf, limits, self.threads or (2 if device == "cuda" else os.cpu_count() or 1))
