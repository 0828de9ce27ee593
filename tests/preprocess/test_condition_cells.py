"""Conditions with one cell for each low-resolution pixel, and a loader that draws one of several sizes a batch."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.bundle import Bundle
from pipeline.config import DecoderConfig, ModelConfig
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader
from preprocess.shards.manifest import load_manifest
from preprocess.shards.sample import stored_shape
from tests.preprocess.conftest import read_tree


@pytest.fixture
def shards(config, autoencoder):
    """16-pixel pictures, latents of 4 × 4 cells, conditions of 3, 5 and 12 pixels and as many cells."""
    preprocess(config.replace(lr_sizes=(3, 5, 12), condition_cells="input"), autoencoder=autoencoder)
    return config.dest


def sizes_of(batches):
    return [batch.condition.shape[-1] for batch in batches]


@pytest.mark.parametrize("mode", ["bicubic", "nearest"])
def test_they_are_what_a_direct_model_makes_of_a_low_resolution_image(config, autoencoder, mode):
    settings = config.replace(dtype="float32", lr_sizes=(6,), condition_resize=mode, condition_cells="input")
    preprocess(settings, autoencoder=autoencoder)
    decoder = DecoderConfig(norm="none", inputs="condition", mid_attention=False)
    model_config = ModelConfig(
        task="direct", image_size=16, condition_resize=mode, autoencoder=autoencoder.config, decoder=decoder
    )
    model = LatentZoom(Bundle(model_config, autoencoder))
    for flip in (False, True):
        with ShardLoader(config.dest, batch_size=11, shuffle=False, flip=flip, lr_size=6) as loader:
            batch = next(iter(loader))
        image = batch.pixels.float() / 127.5 - 1
        small = torch.nn.functional.interpolate(image, (6, 6), mode="bicubic", antialias=True).clamp(-1, 1)
        small = ((small + 1) * 127.5).round() / 127.5 - 1  # 8 bits, as an image file holds it
        assert batch.latents.shape == (11, 4, 4, 4) and batch.condition.shape == (11, 4, 6, 6)
        mean, _ = batch.condition.chunk(2, 1)
        assert torch.allclose(mean, model.condition(small) / model.config.scale_factor, atol=2e-5)


def test_every_size_is_stored_for_the_picture_and_its_mirror(shards, autoencoder):
    for lr_size in (3, 5, 12):
        for flip in (False, True):
            with ShardLoader(shards, batch_size=11, flip=flip, lr_size=lr_size) as loader:
                for batch in islice(loader, 2):
                    image = batch.pixels.float() / 127.5 - 1
                    small = torch.nn.functional.interpolate(image, (lr_size,) * 2, mode="bicubic", antialias=True)
                    small = ((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
                    enlarged = torch.nn.functional.interpolate(small, scale_factor=4, mode="bicubic", antialias=True)
                    expected = autoencoder.moments(enlarged.clamp(-1, 1))
                    assert torch.allclose(batch.condition, expected, atol=3e-2)  # float16


def test_the_choice_is_part_of_the_set_and_sets_without_it_stay_as_they_were(config, autoencoder):
    """Neither the manifest nor the shards of a set on the image's own grid say a word of it."""
    preprocess(config.replace(lr_sizes=(5,)), autoencoder=autoencoder)
    assert load_manifest(config.dest).condition_cells == "image"
    assert b"condition_cells" not in b"".join(read_tree(Path(config.dest)).values())
    with pytest.raises(UserError, match='transform.condition_cells is now "input"') as error:
        preprocess(config.replace(lr_sizes=(5,), condition_cells="input"), autoencoder=autoencoder)
    assert "\n" not in str(error.value)


def test_a_manifest_that_promises_the_other_grid_is_refused(shards):
    manifest = load_manifest(shards)
    transform = {name: value for name, value in manifest.transform.items() if name != "condition_cells"}
    changed = dataclasses.replace(manifest, transform=transform)
    Path(shards, "manifest.json").write_bytes(changed.to_bytes())
    with ShardLoader(shards, batch_size=11, flip=False, lr_size=5) as loader:
        with pytest.raises(UserError, match=r"cond5.latent.npy of .* is not a float16 array of shape \(4, 4, 4\)"):
            next(iter(loader))


@pytest.mark.parametrize(
    ("member", "cells", "shape"),
    [
        ("latent.npy", "input", (6, 8, 8)),
        ("flip.latent.npy", "input", (6, 8, 8)),
        ("cond16.latent.npy", "image", (6, 8, 8)),
        ("cond16.latent.npy", "input", (6, 16, 16)),
        ("flip.cond120.latent.npy", "input", (6, 120, 120)),
    ],
)
def test_stored_shapes(member, cells, shape):
    assert stored_shape(member, [6, 8, 8], cells) == shape


# --- the draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_draws_the_same_size_and_all_come_up(shards, world_size):
    with ShardLoader(shards, batch_size=6, seed=3, lr_size=(3, 5, 12)) as single:
        whole = list(islice(single, 40))
    assert all(8 <= sizes_of(whole).count(size) <= 20 for size in (3, 5, 12))
    parts = []
    for rank in range(world_size):
        options = {"batch_size": 6 // world_size, "rank": rank, "world_size": world_size}
        with ShardLoader(shards, seed=3, lr_size=(3, 5, 12), **options) as loader:
            parts.append(list(islice(loader, 40)))
    for expected, *found in zip(whole, *parts):
        assert sum((batch.ids for batch in found), []) == expected.ids
        assert torch.equal(torch.cat([batch.condition for batch in found]), expected.condition)


def test_another_seed_draws_otherwise(shards):
    drawn = []
    for seed in (3, 4):
        with ShardLoader(shards, batch_size=6, seed=seed, lr_size=(3, 5, 12)) as loader:
            drawn.append(sizes_of(islice(loader, 20)))
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_stream_goes_on_with_the_same_sizes_also_at_another_world_size(shards, world_size):
    with ShardLoader(shards, batch_size=4, seed=5, lr_size=(3, 5, 12)) as loader:
        stream = iter(loader)
        for _ in range(5):
            next(stream)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = list(islice(stream, 9))
    assert len(set(sizes_of(rest))) > 1
    parts = []
    for rank in range(world_size):
        options = {"batch_size": 4 // world_size, "rank": rank, "world_size": world_size, "lr_size": (3, 5, 12)}
        with ShardLoader(shards, seed=5, **options) as loader:
            loader.load_state_dict(state)
            parts.append(list(islice(loader, 9)))
    for expected, *found in zip(rest, *parts):
        assert torch.equal(torch.cat([batch.condition for batch in found]), expected.condition)


def test_sizes_that_are_not_there_are_refused(shards):
    with pytest.raises(UserError, match=r"no condition latents for --lr-size 7; it has \[3, 5, 12\]"):
        ShardLoader(shards, batch_size=1, lr_size=(3, 7))
    with ShardLoader(shards, batch_size=4, lr_size=()) as loader:
        assert next(iter(loader)).condition is None
    with ShardLoader(shards, batch_size=4, lr_size=(5,)) as loader:
        assert set(sizes_of(islice(loader, 8))) == {5}
