"""Ray actors make the same bytes as one process, also when one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from pipeline.errors import UserError
from preprocess.run import preprocess
from preprocess.sources.folder import FolderSource
from tests.preprocess.conftest import read_tree

pytestmark = pytest.mark.slow
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class DeadlySource(FolderSource):
    """Kills the process that first reads a certain image, once."""

    def __init__(self, url: str, flag: str) -> None:
        super().__init__(url)
        self.flag = Path(flag)

    def read(self, image: str) -> bytes:
        if image == "005.png":
            with contextlib.suppress(FileExistsError):  # of all readers, one creates the file
                self.flag.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().read(image)


def test_one_and_three_workers_one_killed_make_the_bytes_of_none(config, pictures, autoencoder, tmp_path):
    config = config.replace(crops_per_image=3, crop_fraction=(0.4, 1.0), lr_sizes=(4,))
    preprocess(config, autoencoder=autoencoder)
    expected = read_tree(Path(config.dest))
    one = config.replace(dest=str(tmp_path / "one"), workers=1, cpus_per_worker=0.5)
    assert preprocess(one, autoencoder=autoencoder).workers_lost == 0
    assert read_tree(tmp_path / "one") == expected
    three = config.replace(dest=str(tmp_path / "three"), workers=3, cpus_per_worker=0.5)
    source = DeadlySource(str(pictures), str(tmp_path / "flag"))
    summary = preprocess(three, autoencoder=autoencoder, source=source)
    assert (summary.workers_lost, summary.num_samples) == (1, 33)
    assert read_tree(tmp_path / "three") == expected


@pytest.mark.more
def test_eight_workers_make_the_bytes_of_none(config, autoencoder, tmp_path):
    config = config.replace(samples_per_shard=1, flips=True)
    preprocess(config, autoencoder=autoencoder)
    eight = config.replace(dest=str(tmp_path / "eight"), workers=8, cpus_per_worker=0.125)
    preprocess(eight, autoencoder=autoencoder)
    assert read_tree(tmp_path / "eight") == read_tree(Path(config.dest))


def test_a_bad_image_in_a_worker_is_the_same_one_line(config, pictures):
    (pictures / "zz.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"^zz.png cannot be used \(not_an_image"):
        preprocess(config.replace(workers=1))
