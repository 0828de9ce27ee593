"""Remote shards come once to a machine, whoever asks for them, and before they are needed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from pipeline import storage
from pipeline.errors import UserError
from preprocess.run import preprocess
from preprocess.shards.cache import ShardCache
from preprocess.shards.loader import ShardLoader
from preprocess.shards.manifest import load_manifest
from preprocess.shards.order import GlobalOrder


@pytest.fixture
def downloads(monkeypatch):
    """(shard, thread that fetches it) of every download; each takes a moment."""
    seen, download = [], ShardCache._download

    def slow(self, entry, path):
        seen.append((entry.name, threading.current_thread().name.split("_")[0]))
        time.sleep(0.2)
        return download(self, entry, path)

    monkeypatch.setattr(ShardCache, "_download", slow)
    return seen


@pytest.fixture
def remote(config, tmp_path):
    """Three shards of 5, 5 and 1 samples in an object store."""
    preprocess(config)
    url = f"memory://{tmp_path.name}/shards"
    storage.publish_dir(config.dest, url, last="manifest.json")
    return url


def test_the_workers_of_a_machine_fetch_each_shard_once(remote, tmp_path, downloads):
    options = {"batch_size": 2, "world_size": 4, "cache_dir": str(tmp_path / "cache"), "num_threads": 2}
    loaders = [ShardLoader(remote, rank=rank, **options) for rank in range(4)]  # each has its own cache object
    with ThreadPoolExecutor(4) as workers:
        parts = list(workers.map(lambda loader: [batch.ids for batch in islice(loader, 3)], loaders))
    for loader in loaders:
        loader.close()
    with ShardLoader(remote, batch_size=8, cache_dir=str(tmp_path / "other")) as single:
        expected = [batch.ids for batch in islice(single, 3)]
    assert [sum(ranks, []) for ranks in zip(*parts)] == expected
    of_the_four = [name for name, _ in downloads[:-3]]
    assert sorted(of_the_four) == ["shard-000000", "shard-000001", "shard-000002"]


def test_the_next_window_is_fetched_while_this_one_is_read(remote, tmp_path, downloads):
    options = {"batch_size": 1, "window_shards": 1, "num_threads": 1, "batches_ahead": 1}
    with ShardLoader(remote, shuffle=False, cache_dir=str(tmp_path / "c"), **options) as loader:
        stream = iter(loader)
        next(stream)
        deadline = time.monotonic() + 20
        while len(list((tmp_path / "c").glob("*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ("shard-000001", "fetcher") in downloads and "shard-000002" not in dict(downloads)
        assert len({batch.ids[0] for batch in islice(stream, 5)}) == 5  # into the second shard
        assert ("shard-000001", "loader") not in downloads
    with ShardLoader(remote, shuffle=False, shards_ahead=0, cache_dir=str(tmp_path / "d"), **options) as loader:
        downloads.clear()
        list(islice(loader, 5))
        assert {thread for _, thread in downloads} == {"loader"}


def test_windows_are_those_of_the_stream():
    for shuffle in (True, False):
        order = GlobalOrder([3, 1, 4, 1, 5], seed=7, shuffle=shuffle, window_shards=2)
        assert order.num_windows == 3
        for position in range(3 * 14):
            _, (number,) = order.stream(position, position + 1)
            assert order.locate(int(number))[0] in order.window(order.window_at(position))
        assert sorted(order.window(3) + order.window(4) + order.window(5)) == [0, 1, 2, 3, 4]


def test_the_last_epoch_fetches_nothing_of_the_next(remote, tmp_path, downloads):
    options = {"batch_size": 11, "window_shards": 3, "cache_dir": str(tmp_path / "cache")}
    with ShardLoader(remote, num_epochs=1, **options) as loader:
        assert [len(batch.ids) for batch in loader] == [11]
    assert len(downloads) == 3


def test_a_closed_loader_gives_up_what_it_waits_for(remote, tmp_path):
    first, second = (ShardCache(remote, str(tmp_path / "cache"), 1 << 30) for _ in range(2))
    entry = load_manifest(remote).shards[0]
    with first._alone(tmp_path / "cache" / f"{entry.sha256}.tar"), ThreadPoolExecutor(1) as waiting:
        asked = waiting.submit(second.open, entry)
        with pytest.raises(TimeoutError):
            asked.result(timeout=0.5)
        second.close()
        with pytest.raises(UserError, match="given up"):
            asked.result(timeout=20)
    first.open(entry).close()  # the lock was given back
