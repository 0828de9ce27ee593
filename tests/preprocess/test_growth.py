"""Growing sets: what is unchanged is not encoded again, and the set is as good as one made at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.autoencoder import Autoencoder
from pipeline.errors import UserError
from preprocess import build
from preprocess.cli import main
from preprocess.encode import LatentEncoder
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader
from preprocess.shards.manifest import load_manifest
from preprocess.shards.verify import verify
from tests.preprocess.conftest import make_pictures, read_tree


@pytest.fixture
def encoded(monkeypatch):
    """Counts the samples that go through the encoder."""
    counts = [0]
    encode = LatentEncoder.encode

    def counted(self, pixels):
        counts[0] += int((pixels.reshape(len(pixels), -1).max(1) > 0).sum())
        return encode(self, pixels)

    monkeypatch.setattr(LatentEncoder, "encode", counted)
    return counts


def _samples(url: str, split: str = "train", **options: object) -> dict[str, tuple[bytes, bytes, bytes]]:
    """Id → pixels, latent and mirrored latent."""
    found: dict[str, list[bytes]] = {}
    for flip in (False, True):
        with ShardLoader(url, split=split, batch_size=1, num_epochs=1, shuffle=False, flip=False, **options) as loader:
            name = "flip.latent.npy" if flip else "latent.npy"
            for shard, entry in enumerate(loader.entries):
                reader = loader._reader(shard)
                for position in range(entry.num_samples):
                    parts = [reader.latent(position, name).tobytes()]
                    parts += [] if flip else [bytes(reader.member(position, "png"))]
                    found.setdefault(reader.ids[position], []).extend(parts)
    return {name: tuple(parts) for name, parts in found.items()}


def _change(pictures: Path, num_bytes: int) -> None:
    """Three new pictures, one removed, and one changed that then has `num_bytes`."""
    make_pictures(pictures / "more", 3, 50, 50)
    (pictures / "003.png").unlink()
    (pictures / "005.png").write_bytes((pictures / "006.png").read_bytes().ljust(num_bytes, b"\0"))


@pytest.mark.parametrize("recheck", ["hash", "size"])
def test_an_updated_set_is_the_set_made_at_once(config, pictures, autoencoder, tmp_path, encoded, recheck):
    config = config.replace(dtype="float32", recheck=recheck, lr_sizes=(4,))
    (pictures / "005.png").write_bytes((pictures / "005.png").read_bytes().ljust(20_000, b"\0"))
    first = preprocess(config, autoencoder=autoencoder)
    before = load_manifest(config.dest)
    _change(pictures, 20_000 if recheck == "hash" else 20_001)
    with pytest.raises(UserError, match="or --update where only the images changed"):
        preprocess(config, autoencoder=autoencoder)
    encoded[0] = 0
    summary = preprocess(config.replace(update=True), autoencoder=autoencoder)
    assert encoded[0] == 4 and (summary.num_samples, summary.num_images, summary.num_reused) == (13, 13, 9)
    manifest = load_manifest(config.dest)
    assert manifest.grown_from == before.digest == first.manifest_digest
    fresh = config.replace(dest=str(tmp_path / "fresh"))
    preprocess(fresh, autoencoder=autoencoder)
    assert _samples(config.dest) == _samples(fresh.dest)
    for name in ("latent_mean", "latent_std"):
        assert getattr(manifest, name) == pytest.approx(getattr(load_manifest(fresh.dest), name))
    assert not verify(config.dest).damage
    old = f"{config.dest}/manifest-{before.digest[:12]}.json"
    assert load_manifest(old) == before and len(_samples(old)) == 11 and "003.png" in _samples(old)
    tree = read_tree(Path(config.dest))
    again = preprocess(config.replace(update=True), autoencoder=autoencoder)
    assert (again.num_reused, again.num_shards_kept, read_tree(Path(config.dest))) == (13, again.num_shards, tree)


def test_sets_grow_week_by_week_and_numbers_are_never_used_twice(config, pictures, tmp_path):
    preprocess(config)
    manifests = [load_manifest(config.dest)]
    for week in range(3):
        make_pictures(pictures / f"week{week}", 2)
        for path in (pictures / f"week{week - 1}").glob("*.png"):
            path.unlink()
        preprocess(config.replace(update=True))
        manifests.append(load_manifest(config.dest))
    digests = {}
    for manifest in manifests:
        for entry in manifest.shards:
            assert digests.setdefault(entry.name, entry.sha256) == entry.sha256
    for manifest in manifests[:-1]:
        url = f"{config.dest}/manifest-{manifest.digest[:12]}.json"
        with ShardLoader(url, batch_size=manifest.num_samples, num_epochs=1) as loader:
            assert len(set(next(iter(loader)).ids)) == manifest.num_samples
    assert manifests[-1].num_samples == 13 and not verify(config.dest).damage


def test_a_killed_update_continues_and_bad_pictures_that_were_mended_come_in(config, pictures, monkeypatch):
    good = (pictures / "004.png").read_bytes()
    (pictures / "004.png").write_bytes(b"junk")
    config = config.replace(policy="skip", samples_per_shard=2)
    assert preprocess(config).num_rejected == 1
    make_pictures(pictures / "more", 6)
    (pictures / "004.png").write_bytes(good)
    (pictures / "007.png").write_bytes(b"junk")
    finish = build.Publisher.close_shard
    calls = []

    def dying(self, shard, rejects):
        calls.append(shard.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        finish(self, shard, rejects)

    before = load_manifest(config.dest)
    monkeypatch.setattr(build.Publisher, "close_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        preprocess(config.replace(update=True))
    assert load_manifest(config.dest) == before
    monkeypatch.setattr(build.Publisher, "close_shard", finish)
    summary = preprocess(config.replace(update=True))
    assert (summary.num_images, summary.num_samples, summary.rejected) == (17, 16, {"not_an_image": 1})
    assert summary.num_shards_kept > len([e for e in before.shards if e in load_manifest(config.dest).shards])
    ledger = Path(config.dest, "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in ledger] == ["007.png"] and not verify(config.dest).damage
    tree = read_tree(Path(config.dest))
    again = preprocess(config.replace(update=True))  # what is still bad is no news
    assert (again.num_samples, again.rejected) == (16, {"not_an_image": 1}) and read_tree(Path(config.dest)) == tree


def test_numbered_crops_and_splits_follow_the_source(config, pictures, tmp_path):
    (pictures / "val").mkdir()
    (pictures / "000.png").rename(pictures / "val" / "v.png")
    config = config.replace(crops_per_image=3, crop_fraction=(0.5, 1.0), val_folder="val")
    preprocess(config)
    (pictures / "001.png").rename(pictures / "val" / "001.png")
    config = config.replace(update=True)
    summary = preprocess(config)
    assert summary.splits == {"train": 27, "val": 6} and summary.num_reused == 30
    (tmp_path / "val.txt").write_text("002.png\nv.png\n")
    moved = preprocess(config.replace(val_folder="", val_list=str(tmp_path / "val.txt")))
    assert moved.splits == {"train": 27, "val": 6} and moved.num_reused == 33


def test_other_transforms_and_encoders_are_not_mixed_in(config, autoencoder):
    preprocess(config, autoencoder=autoencoder)
    with pytest.raises(UserError, match="size was 16, now 32"):
        preprocess(config.replace(update=True, size=32), autoencoder=autoencoder)
    with pytest.raises(UserError, match="the autoencoder was .* now none.*reencode"):
        preprocess(config.replace(update=True))


def test_an_update_of_nothing_is_a_first_run_and_damaged_shards_are_encoded_anew(config):
    config = config.replace(update=True)
    assert preprocess(config).num_samples == 11
    path = Path(config.dest, "shard-000001.tar")
    path.write_bytes(path.read_bytes()[:-1])
    make_pictures(Path(config.source_url) / "more", 1)
    summary = preprocess(config)
    assert (summary.num_samples, summary.num_reused) == (12, 6) and len(set(_ids(config.dest))) == 12


def _ids(url: str) -> list[str]:
    with ShardLoader(url, batch_size=64, num_epochs=1) as loader:
        return next(iter(loader)).ids


def test_several_sizes_in_one_run(pictures, tmp_path, capsys):
    argv = ["folder", str(pictures), str(tmp_path / "out"), "--sizes", "16", "32"]
    assert main(argv) == 0
    assert "11 of 16x16" in capsys.readouterr().out
    assert {load_manifest(str(tmp_path / "out" / size)).size for size in ("16", "32")} == {16, 32}
    assert main([*argv, "--json"]) == 0
    assert [one["size"] for one in json.loads(capsys.readouterr().out)] == [16, 32]


def test_latents_move_to_a_new_encoder(config, autoencoder, tmp_path, monkeypatch):
    from pipeline.bundle import Bundle, save_bundle
    from pipeline.config import ModelConfig

    config = config.replace(val_fraction=0.4, crops_per_image=2, crop_fraction=(0.5, 0.9), pixel_format="png")
    preprocess(config, autoencoder=autoencoder)
    torch.manual_seed(5)
    other = Autoencoder(autoencoder.config).eval()
    save_bundle(str(tmp_path / "other"), Bundle(ModelConfig(image_size=16, autoencoder=other.config), other))
    argv = ["reencode", config.dest, str(tmp_path / "moved"), "--autoencoder", "by-name", "--batch-size", "2"]
    assert main(argv, bundle_of=lambda name: str(tmp_path / "other") if name == "by-name" else name) == 0
    moved, old = load_manifest(str(tmp_path / "moved")), load_manifest(config.dest)
    assert moved.autoencoder_identity == other.identity() and moved.splits == old.splits
    preprocess(config.replace(dest=str(tmp_path / "direct")), autoencoder=other)
    for split in old.splits:
        first, second = _samples(str(tmp_path / "moved"), split), _samples(str(tmp_path / "direct"), split)
        assert first.keys() == second.keys() and all(first[name][1] == second[name][1] for name in first)
    with ShardLoader(str(tmp_path / "moved"), batch_size=22, shuffle=False) as loader:
        info = json.loads(bytes(loader._reader(0).member(0, "json")))
        assert info["image"].endswith(".png") and info["source_size"] == [40, 52] and info["box"]
