"""Workers that do not see one run folder say so at the start, in one line on each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from two_workers import outputs, start_workers

from pipeline.errors import UserError
from training.shared_folder import require_shared_folder
from training.world import World, current_world


def worker(place: str, patience: str) -> None:
    """{} in the place is the worker's rank: so its folder is its own, as on a machine of its own."""
    world = current_world("cpu")
    try:
        require_shared_folder(place.format(world.rank), world, patience_s=float(patience))
        print("shared", flush=True)
    except UserError as error:
        print(error, flush=True)
    dist.destroy_process_group()  # torch now and then aborts a process that ends with its threads


def test_two_folders_are_named_and_one_is_silent(tmp_path: Path) -> None:
    for text in outputs(start_workers(__file__, f"{tmp_path}/own-{{}}", "0.5")):
        assert "run folder" in text and "is not shared: worker 1 on " in text and "cannot see what worker 0 on " in text
    for text in outputs(start_workers(__file__, f"{tmp_path}/one", "20")):
        assert text.strip().endswith("shared")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("place", "size"), [("{}", 1), ("memory://bucket/run", 2)])
def test_nothing_is_asked_where_it_is_plain(tmp_path: Path, place: str, size: int) -> None:
    require_shared_folder(place.format(tmp_path / "run"), World(0, size, 0, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    worker(*sys.argv[1:])
