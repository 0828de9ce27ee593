"""The loader's global order, resume and refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.storage import sha256_bytes
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader
from preprocess.shards.manifest import load_manifest
from preprocess.shards.order import GlobalOrder
from preprocess.shards.receipt import load_receipt, seal


def _ids(loader, num):
    return [batch.ids for batch in islice(loader, num)]


@pytest.fixture
def shards(config, autoencoder):
    preprocess(config, autoencoder=autoencoder)
    return config.dest


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_global_batches_are_the_same_for_every_world_size(shards, world_size):
    with ShardLoader(shards, batch_size=6, seed=3) as single:
        expected = _ids(single, 7)
    loaders = [
        ShardLoader(shards, batch_size=6 // world_size, rank=rank, world_size=world_size, seed=3)
        for rank in range(world_size)
    ]
    parts = [_ids(loader, 7) for loader in loaders]
    for loader in loaders:
        loader.close()
    assert [sum(ranks, []) for ranks in zip(*parts)] == expected


def test_every_epoch_holds_every_sample_once_in_another_order(shards):
    with ShardLoader(shards, batch_size=11) as loader:
        first, second = _ids(loader, 2)
    assert sorted(first) == sorted(second) == [f"{n:03d}.png" for n in range(11)]
    assert first != second


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_continues_mid_epoch_exactly_also_at_another_world_size(shards, world_size):
    with ShardLoader(shards, batch_size=4, seed=5) as loader:
        stream = iter(loader)
        for _ in range(4):  # 16 samples: in the middle of the second epoch
            next(stream)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = list(islice(stream, 5))
    parts = []
    for rank in range(world_size):
        options = {"batch_size": 4 // world_size, "rank": rank, "world_size": world_size, "seed": 5}
        with ShardLoader(shards, **options) as loader:
            loader.load_state_dict(state)
            parts.append(list(islice(loader, 5)))
    for expected, *found in zip(rest, *parts):
        assert sum((batch.ids for batch in found), []) == expected.ids
        assert torch.equal(torch.cat([batch.latents for batch in found]), expected.latents)
        assert torch.equal(torch.cat([batch.pixels for batch in found]), expected.pixels)


def test_load_state_moves_a_stream_that_already_runs(shards):
    with ShardLoader(shards, batch_size=3) as loader:
        state = loader.state_dict()
        first = _ids(loader, 3)
        loader.load_state_dict(state)
        assert _ids(loader, 3) == first


def test_flips_differ_by_epoch_and_pair_pixels_with_the_encoded_flip(shards, autoencoder):
    with ShardLoader(shards, batch_size=11, seed=1) as loader, ShardLoader(shards, batch_size=11, flip=False) as plain:
        reference = next(iter(plain))
        straight = dict(zip(reference.ids, reference.pixels))
        mirrored = []
        for batch in islice(loader, 2):
            flags = {i: bool(torch.equal(p, straight[i].flip(-1))) for i, p in zip(batch.ids, batch.pixels)}
            mirrored.append(sorted(flags.items()))
            image = batch.pixels.float() / 127.5 - 1
            assert torch.allclose(batch.latents, autoencoder.moments(image), atol=2e-2)
    assert mirrored[0] != mirrored[1]
    assert any(flag for _, flag in mirrored[0]) and not all(flag for _, flag in mirrored[0])


def test_foreign_autoencoder_is_refused(shards, autoencoder):
    ShardLoader(shards, batch_size=1, autoencoder_identity=autoencoder.identity()).close()
    with pytest.raises(UserError, match="but the model's is 0123"):
        ShardLoader(shards, batch_size=1, autoencoder_identity="0123" * 16)


def test_unknown_schema_is_refused(shards):
    path = Path(shards, "manifest.json")
    manifest = json.loads(path.read_text())
    for change, named in (({"schema_version": 99}, "schema version 99"), ({"size": 17}, "its own checksum")):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match=named):
            ShardLoader(shards, batch_size=1)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _pickled_array(trap: Path, size: int) -> bytes:
    """A .npy of objects, `size` bytes, that would spring the trap."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(trap)], dtype=object), allow_pickle=True)
    assert buffer.tell() <= size
    return buffer.getvalue().ljust(size, b"\0")


def _reseal(folder: Path, name: str, receipt: dict[str, object]) -> None:
    """Make receipt and manifest agree with the shard as it is now, as someone would who wants it to be read."""
    receipt["sha256"] = sha256_bytes((folder / f"{name}.tar").read_bytes())
    (folder / f"{name}.json").write_bytes(seal(receipt))
    manifest = load_manifest(str(folder))
    resealed = {"sha256": receipt["sha256"], "receipt_sha256": sha256_bytes(seal(receipt))}
    entries = [dataclasses.replace(e, **(resealed if e.name == name else {})) for e in manifest.shards]
    suffixes = receipt["suffixes"]
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, shards=entries, suffixes=suffixes).to_bytes())


def test_a_pickled_array_in_a_resealed_shard_is_refused_unread(config, autoencoder, tmp_path):
    preprocess(config.replace(size=64, dtype="float32"), autoencoder=autoencoder)
    folder, trap = Path(config.dest), tmp_path / "sprung"
    path, receipt = folder / "shard-000000.tar", load_receipt(config.dest, "shard-000000")
    column = receipt["suffixes"].index("latent.npy")
    offset, length = receipt["offsets"][0][2 * column : 2 * column + 2]
    hostile = _pickled_array(trap, length)
    np.load(io.BytesIO(hostile), allow_pickle=True)
    assert trap.exists()  # it would have worked
    trap.unlink()
    data = path.read_bytes()
    path.write_bytes(data[:offset] + hostile + data[offset + length :])
    _reseal(folder, "shard-000000", receipt)
    with ShardLoader(config.dest, batch_size=11, flip=False) as loader:
        with pytest.raises(UserError, match="shard-000000: latent.npy of .* is not a float32 array"):
            next(iter(loader))
    assert not trap.exists()


def test_a_pickled_member_in_a_resealed_shard_is_refused_unread(shards, tmp_path):
    folder, trap = Path(shards), tmp_path / "sprung"
    path, receipt = folder / "shard-000000.tar", load_receipt(shards, "shard-000000")
    path.write_bytes(path.read_bytes().replace(b".latent.npy\0", b".latent.pyd\0"))
    column = receipt["suffixes"].index("latent.npy")
    offset, length = receipt["offsets"][0][2 * column : 2 * column + 2]
    hostile = pickle.dumps(Trap(trap)).ljust(length, b"\0")
    data = path.read_bytes()
    path.write_bytes(data[:offset] + hostile[:length] + data[offset + length :])
    receipt["suffixes"][column] = "latent.pyd"
    _reseal(folder, "shard-000000", receipt)
    with pytest.raises(UserError, match=r"member \.latent\.pyd is not part of the sample contract"):
        ShardLoader(shards, batch_size=1)
    assert not trap.exists()


def test_a_flipped_byte_is_found_on_first_read(shards):
    path = sorted(Path(shards).glob("*.tar"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard-000001.tar is damaged"), ShardLoader(shards, batch_size=11) as loader:
        next(iter(loader))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 7),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_is_a_permutation(sizes, seed, window, epoch):
    order = GlobalOrder(sizes, seed=seed, shuffle=True, window_shards=window)
    assert sorted(order.epoch(epoch)) == list(range(sum(sizes)))


def test_flip_coins_are_fair_and_independent_of_the_order():
    order = GlobalOrder([1000] * 20, seed=7, shuffle=True, window_shards=4)
    coins = order.coins(np.zeros(20000, int), np.arange(20000))
    assert abs(coins.mean() - 0.5) < 0.02
    shuffled = order.epoch(0)
    assert np.array_equal(order.coins(np.zeros(20000, int), shuffled), coins[shuffled])
