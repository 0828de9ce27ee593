"""Whether the workers of several machines see one run folder: told at the start, not when the first checkpoint waits
for parts that are written elsewhere."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid

from pipeline import storage
from pipeline.errors import UserError
from training.world import World

_PATIENCE_S = 30.0
"""A network file system may show a new file to other machines after some time."""


def require_shared_folder(run_dir: str, world: World, *, patience_s: float = _PATIENCE_S) -> None:
    """`UserError` on every worker where one does not see, within patience_s, what worker 0 writes to the run folder.
    Object stores are shared by their nature. Collective."""
    if world.size == 1 or not storage.is_local(run_dir):
        return
    probe = storage.join(run_dir, f".probe-{uuid.uuid4().hex}") if world.is_main else ""
    if world.is_main:
        storage.write_bytes(probe, b"")
    host = socket.gethostname()
    try:
        name, main_host = world.broadcast((probe.rsplit("/", 1)[-1], host))
        is_blind = not world.is_main and not _appears(storage.join(run_dir, name), patience_s)
        seen = enumerate(world.gather((host, is_blind)))
        blind = [f"worker {rank} on {where}" for rank, (where, is_it) in seen if is_it]
    finally:
        if world.is_main:
            with contextlib.suppress(OSError):
                storage.remove_tree(probe)
    if blind:
        raise UserError(
            f"the run folder {run_dir} is not shared: {', '.join(blind[:3])}{' and others' if len(blind) > 3 else ''} "
            f"cannot see what worker 0 on {main_host} writes there; use a folder of a shared file system, or s3://..."
        )


def _appears(path: str, patience_s: float) -> bool:
    """Whether a file is there, sooner or later."""
    deadline = time.monotonic() + patience_s
    while not storage.exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
