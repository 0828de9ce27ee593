"""Our shards in the webdataset library's hands: the same samples, divided by node and worker."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import fsspec
import pytest
import webdataset as wds

from pipeline.errors import UserError
from preprocess.run import preprocess
from preprocess.shards.as_webdataset import as_webdataset
from preprocess.shards.loader import ShardLoader
from preprocess.shards.ustar import SampleWriter


@pytest.fixture
def shards(config, autoencoder):
    """Eleven samples in six shards, with latents, mirrored ones and a condition."""
    preprocess(config.replace(lr_sizes=(4,), samples_per_shard=2), autoencoder=autoencoder)
    return config.dest


def test_samples_are_those_of_the_loader(shards):
    with ShardLoader(shards, batch_size=11, shuffle=False, flip=False, lr_size=4, num_epochs=1) as loader:
        batch = next(iter(loader))
    samples = list(as_webdataset(shards))
    assert [sample["info"]["id"] for sample in samples] == batch.ids
    for number, sample in enumerate(samples):
        assert sample["pixels"].equal(batch.pixels[number]) and sample["latent"].equal(batch.latents[number])
        assert sample["cond4_latent"].equal(batch.condition[number])
        assert sample["flip_latent"].shape == sample["latent"].shape
    assert set(next(iter(as_webdataset(shards, pixels=False, latents=False)))) == {"__key__", "__url__", "info"}


def test_nodes_and_workers_share_the_shards(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        dataset = as_webdataset(shards, latents=False).map(lambda s: s["info"]["id"]).batched(2, collation_fn=None)
        seen.append([name for batch in wds.WebLoader(dataset, batch_size=None, num_workers=2) for name in batch])
    assert len(seen[0]) + len(seen[1]) == 11 == len({*seen[0], *seen[1]}) and min(map(len, seen)) >= 4


def test_a_seed_decides_the_order(shards):
    def ids(seed: int) -> list[str]:
        return [s["info"]["id"] for s in as_webdataset(shards, pixels=False, latents=False, shuffle=4, seed=seed)]

    first, again, other = ids(1), ids(1), ids(2)
    assert first == again != other and sorted(first) == sorted(other)


def test_remote_shards_are_opened_through_fsspec(shards):
    fs = fsspec.filesystem("memory")
    for path in Path(shards).iterdir():
        fs.pipe_file(f"/as-wds/{path.name}", path.read_bytes())
    assert len(list(as_webdataset("memory://as-wds", latents=False))) == 11
    fs.rm("/as-wds", recursive=True)


def test_the_documented_pipeline_runs_as_written(shards, tmp_path, monkeypatch, capsys):
    page = Path(__file__).resolve().parents[2] / "docs/verbs/preprocess.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "latents").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "documented"})
    lines = capsys.readouterr().out.splitlines()
    assert lines and set(lines) == {"4 torch.Size([4, 3, 16, 16]) torch.Size([4, 4, 4, 4])"}


def test_a_missing_split_and_a_cut_shard_are_named(shards):
    with pytest.raises(UserError, match="has no split 'val'; it has train"):
        as_webdataset(shards, "val")
    path = Path(shards, "shard-000001.tar")
    path.write_bytes(path.read_bytes()[:5120])
    with pytest.raises(UserError, match="shard-000001.tar is missing or not"):
        as_webdataset(shards)


def test_the_writer_makes_the_plain_tar_that_tarfile_makes():
    members = {"png": b"p" * 700, "json": b"{}", "latent.npy": b"", "flip.latent.npy": b"x" * 512}
    ours, plain = io.BytesIO(), io.BytesIO()
    writer = SampleWriter(ours)
    places = [writer.add(f"{number:09d}", members) for number in range(30)]
    writer.close()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(30):
            for suffix, content in sorted(members.items()):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))
    assert ours.getvalue() == plain.getvalue()
    for place in places:
        contents = [ours.getvalue()[place[i] : place[i] + place[i + 1]] for i in range(0, 8, 2)]
        assert contents == [content for _, content in sorted(members.items())]
