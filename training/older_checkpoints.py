"""DeepSpeed checkpoints of bf16 runs from when their weights were bf16 beside float32 masters, as today's engine reads
them: weights are float32 now, and the masters of then are the weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_OLD_PREFIX = "bf16_zero_"
_WHOLE = "mp_rank_00_model_states.pt"


@contextlib.contextmanager
def readable(folder: Path, names: list[str], zero_stage: int) -> Iterator[Path]:
    """A folder that holds the checkpoint in today's form: `folder` itself, or links to its files under today's names
    that last as long as the context. names: the trained parameters, in the optimizer's order."""
    state = None
    if not zero_stage:
        # Only files whose hashes the checkpoint's manifest names come here; DeepSpeed reads this one in the same way.
        whole = torch.load(folder / _WHOLE, map_location="cpu", weights_only=False)
        state = whole if "fp32_groups" in (whole.get("optimizer") or {}) else None
    if state is None and not any(folder.glob(f"{_OLD_PREFIX}*")):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="latentzoom-older-") as scratch:
        made = Path(scratch, folder.name)
        made.mkdir()
        for file in folder.iterdir():
            if state is None or file.name != _WHOLE:
                (made / file.name.removeprefix("bf16_")).symlink_to(file.resolve())
        if state is not None:
            optimizer = state["optimizer"]
            state["module"].update(zip(names, (m for group in optimizer["fp32_groups"] for m in group), strict=True))
            torch.save({**state, "optimizer": optimizer["optimizer_state_dict"]}, made / _WHOLE)
        yield made
