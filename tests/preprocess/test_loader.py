"""The loader's global order, resume and refusals."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from preprocess.loader import ShardLoader
from preprocess.order import GlobalOrder
from preprocess.run import preprocess


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


def test_unknown_schema_and_pickled_members_are_refused(shards):
    path = Path(shards, "manifest.json")
    manifest = json.loads(path.read_text())
    for change, named in (({"schema_version": 99}, "schema version 99"), ({"size": 17}, "its own checksum")):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match=named):
            ShardLoader(shards, batch_size=1)
    from preprocess.plan import canonical_json
    from preprocess.sample import check_suffixes

    assert canonical_json({"b": 1, "a": 2}) == b'{"a":2,"b":1}'
    with pytest.raises(UserError, match=r"member \.pyd is not part"):
        check_suffixes(["json", "pyd"], "x")


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
