"""Source → shards → loader: contents, splits, statistics, repeatability."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from PIL import Image

from pipeline.bundle import Bundle
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from preprocess.pictures.images import crop_and_resize, decode
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader
from preprocess.shards.manifest import load_manifest
from preprocess.shards.ustar import read_index
from tests.preprocess.conftest import read_tree


def _all_batches(url, **options):
    with ShardLoader(url, num_epochs=1, **options) as loader:
        return list(loader)


def test_pixels_are_the_recorded_crops_of_the_sources(config, pictures):
    preprocess(config.replace(crop="random", crops_per_image=3, crop_fraction=(0.4, 0.9)))
    seen = set()
    for path in sorted(config_path(config).glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        assert list(members) == sorted(members)
        for name, content in members.items():
            if name.endswith(".json"):
                info = json.loads(content)
                stored = np.asarray(Image.open(io.BytesIO(members[name.replace(".json", ".png")])))
                picture = decode((pictures / info["image"]).read_bytes(), 10**6)
                expected = crop_and_resize(picture, tuple(info["box"]), 16, "bicubic")
                assert np.array_equal(stored, np.asarray(expected))
                top, left, bottom, right = info["box"]
                assert 0 <= top < bottom <= 40 and 0 <= left < right <= 52
                assert bottom - top == right - left and 0.4 * 40 - 1 <= bottom - top <= 0.9 * 40 + 1
                seen.add(info["id"])
    assert seen == {f"{n:03d}.png#{k:04d}" for n in range(11) for k in range(3)}


def config_path(config):
    from pathlib import Path

    return Path(config.dest)


def test_latents_are_those_of_the_stored_pixels_and_of_their_mirror(config, autoencoder):
    preprocess(config.replace(dtype="float32", lr_sizes=(4,)), autoencoder=autoencoder)
    for flip in (False, True):
        for batch in _all_batches(config.dest, batch_size=2, shuffle=False, flip=flip, lr_size=4):
            image = batch.pixels.float() / 127.5 - 1
            assert torch.allclose(batch.latents, autoencoder.moments(image), atol=2e-5)
            assert batch.condition.shape == batch.latents.shape
            assert not torch.allclose(batch.condition, batch.latents, atol=1e-2)


@pytest.mark.parametrize("mode", ["bicubic", "nearest"])
def test_cached_conditions_are_those_that_the_model_makes_of_a_low_resolution_image(config, autoencoder, mode):
    settings = config.replace(dtype="float32", lr_sizes=(6,), condition_resize=mode)
    preprocess(settings, autoencoder=autoencoder)
    model_config = ModelConfig(
        task="sr", image_size=16, lr_size=6, condition_resize=mode, autoencoder=autoencoder.config
    )
    model = LatentZoom(Bundle(model_config, autoencoder))
    for flip in (False, True):
        for batch in _all_batches(config.dest, batch_size=2, shuffle=False, flip=flip, lr_size=6):
            image = batch.pixels.float() / 127.5 - 1
            small = torch.nn.functional.interpolate(image, (6, 6), mode="bicubic", antialias=True).clamp(-1, 1)
            small = ((small + 1) * 127.5).round() / 127.5 - 1  # 8 bits, as an image file holds it
            mean, _ = batch.condition.chunk(2, 1)
            assert torch.allclose(mean, model.condition(small) / model.config.scale_factor, atol=2e-5)
            if mode == "nearest":
                rows = torch.arange(16) * 6 // 16  # floor(i · H_in / H_out), as the released code has it
                released = small[:, :, rows][:, :, :, rows]
                assert torch.allclose(batch.condition, autoencoder.moments(released), atol=2e-5)


def test_tar_headers_hold_nothing_of_time_place_or_person(config, autoencoder):
    preprocess(config, autoencoder=autoencoder)
    for path in config_path(config).glob("shard-*.tar"):
        data = path.read_bytes()
        for _, offset, _ in read_index(path):
            header = data[offset - 512 : offset]
            assert header[257:265] == b"ustar\x0000" and header[156:157] == b"0"  # USTAR, a plain file
            fields = (header[100:108], header[108:116], header[116:124], header[136:148])
            assert [int(field.rstrip(b"\0 "), 8) for field in fields] == [0o644, 0, 0, 0]  # mode, owner, group, time
            assert not header[265:329].strip(b"\0")  # names of owner and group


def test_statistics_are_those_of_all_stored_latents(config, autoencoder):
    preprocess(config, autoencoder=autoencoder)
    batches = _all_batches(config.dest, batch_size=4, shuffle=False, flip=False)
    stored = torch.cat([batch.latents for batch in batches]).double()
    mean, log_variance = stored.chunk(2, 1)
    manifest = load_manifest(config.dest)
    assert np.allclose(manifest.latent_mean, mean.mean((0, 2, 3)), rtol=1e-9)
    variance = (mean**2 + log_variance.exp()).mean() - mean.mean() ** 2
    assert manifest.scale_factor == pytest.approx(float(variance) ** -0.5, rel=1e-9)


def test_a_held_out_photograph_never_gives_a_training_crop(config):
    preprocess(config.replace(crop="random", crops_per_image=4, crop_fraction=(0.5, 1.0), val_fraction=0.3))
    images = {
        split: {i.split("#")[0] for batch in _all_batches(config.dest, batch_size=3, split=split) for i in batch.ids}
        for split in ("train", "val")
    }
    assert images["train"] and images["val"] and not images["train"] & images["val"]
    assert len(images["train"] | images["val"]) == 11


def test_split_lists_name_files_with_or_without_folder_and_suffix(config, tmp_path):
    (tmp_path / "val.txt").write_text("003\n004.png\n")
    preprocess(config.replace(val_list=str(tmp_path / "val.txt")))
    ids = [i for batch in _all_batches(config.dest, batch_size=3, split="val", shuffle=False) for i in batch.ids]
    assert sorted(ids) == ["003.png", "004.png"]
    (tmp_path / "val.txt").write_text("099\n")
    with pytest.raises(UserError, match="'099' is not in the source"):
        preprocess(config.replace(val_list=str(tmp_path / "val.txt"), dest=str(tmp_path / "other")))


def test_two_runs_and_a_rerun_make_the_same_bytes(config, autoencoder, tmp_path):
    first = preprocess(config, autoencoder=autoencoder)
    tree = read_tree(config_path(config))
    preprocess(config.replace(dest=str(tmp_path / "again"), decode_threads=1), autoencoder=autoencoder)
    assert read_tree(tmp_path / "again") == tree
    rerun = preprocess(config, autoencoder=autoencoder)
    assert rerun.num_shards_kept == 3 and rerun.manifest_digest == first.manifest_digest
    assert read_tree(config_path(config)) == tree


def test_webdataset_reads_the_shards(config, autoencoder):
    preprocess(config, autoencoder=autoencoder)
    urls = sorted(str(p) for p in config_path(config).glob("shard-*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 11
    assert samples[0]["png"].shape == (16, 16, 3) and samples[0]["latent.npy"].shape == (4, 4, 4)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"size": 32}, "transform.size was 16, now 32"),
        ({"seed": 1}, "transform.seed was 0, now 1"),
        ({"batch_size": 3}, "shards.batch_size was 2, now 3"),
    ],
)
def test_changed_settings_are_refused_by_name(config, change, named):
    preprocess(config)
    with pytest.raises(UserError, match=named):
        preprocess(config.replace(**change))


def test_changed_weights_are_refused(config, autoencoder):
    preprocess(config, autoencoder=autoencoder)
    other = type(autoencoder)(autoencoder.config)
    with pytest.raises(UserError, match="encoder.identity was"):
        preprocess(config, autoencoder=other)


def test_changed_sources_are_refused_by_name(config, pictures):
    preprocess(config)
    (pictures / "007.png").write_bytes((pictures / "006.png").read_bytes() + b" ")
    with pytest.raises(UserError, match="changed images: 007.png"):
        preprocess(config)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_of_a_diffusers_folder_are_what_diffusers_computes(config, tmp_path, kind):
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8), "latent_channels": 3, "norm_num_groups": 4,
    }  # fmt: skip
    theirs = AutoencoderKL(**blocks) if kind == "kl" else VQModel(**blocks, num_vq_embeddings=20)
    theirs.eval().save_pretrained(tmp_path / "autoencoder")
    preprocess(config.replace(autoencoder=str(tmp_path / "autoencoder"), dtype="float32"))
    for batch in _all_batches(config.dest, batch_size=4, flip=False, pixels=True, latents=True):
        with torch.no_grad():
            encoded = theirs.encode(batch.pixels.float() / 127.5 - 1)
        expected = encoded.latent_dist.parameters if kind == "kl" else encoded.latents
        torch.testing.assert_close(batch.latents, expected, atol=1e-5, rtol=1e-5)
