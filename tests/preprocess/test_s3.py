"""Shards on S3. The endpoint is moto's simulator, behind a proxy that fails 10 % of the requests."""

from __future__ import annotations

import json
import urllib.request
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from pipeline.errors import UserError
from preprocess.cli import main
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader
from preprocess.shards.verify import verify
from preprocess.sources import open_source
from preprocess.sources.folder import FolderSource
from tests.preprocess.conftest import read_tree
from tests.preprocess.s3_proxy import FaultyProxy


@pytest.fixture
def proxy(monkeypatch):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = FaultyProxy(*server.get_host_and_port(), rate=0.0)
    for name, value in (
        ("AWS_ENDPOINT_URL", proxy.url),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/moto-api/reset", method="POST")).read()
    fsspec.filesystem("s3").mkdir("bucket")
    yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()
    server.stop()


def _remote_tree(url: str) -> dict[str, bytes]:
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    root = url.removeprefix("s3://")
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


@pytest.mark.slow
def test_an_endpoint_that_fails_a_tenth_of_its_requests_gives_the_same_bytes(proxy, config, pictures, tmp_path):
    config = config.replace(crops_per_image=4, crop_fraction=(0.4, 1.0))
    preprocess(config)
    local = read_tree(Path(config.dest))
    fs = fsspec.filesystem("s3")
    for path in sorted(pictures.iterdir()):
        fs.pipe_file(f"bucket/in/{path.name}", path.read_bytes())
    proxy.rate = 0.1
    remote = config.replace(source_url="s3://bucket/in", dest="s3://bucket/out", retries=10)
    summary = preprocess(remote)
    assert summary.num_samples == 44
    report = verify("s3://bucket/out")
    assert not report.damage and report.num_samples == 44
    with ShardLoader("s3://bucket/out", batch_size=11, cache_dir=str(tmp_path / "cache")) as loader:
        ids = [batch.ids for batch in islice(loader, 4)]
    proxy.rate = 0.0
    assert _remote_tree("s3://bucket/out") == local
    with ShardLoader(config.dest, batch_size=11) as loader:
        assert [batch.ids for batch in islice(loader, 4)] == ids
    assert proxy.num_failures >= 5, f"{proxy.num_failures} of {proxy.num_requests} failed: nothing was tested"


@pytest.fixture
def no_other_retries(proxy, monkeypatch):
    """s3fs and botocore try once, so that only this program's own attempts count."""
    monkeypatch.setattr("pipeline.retry.MAX_WAIT", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()


def test_opening_a_source_is_tried_again(proxy, no_other_retries, config, pictures):
    fs = fsspec.filesystem("s3")
    data = (pictures / "000.png").read_bytes()
    record = {"image": {"file_path": "images1024x1024/00000.png", "file_md5": "0" * 32}, "metadata": {"license": "BY"}}
    files = {"00000.png": data, "ffhq-dataset-v2.json": json.dumps({"0": record}).encode()}
    files |= {"ffhqtrain.txt": b"00000.png\n", "ffhqvalidation.txt": b"00001.png\n"}
    for name, content in files.items():
        fs.pipe_file(f"bucket/ffhq/{name}", content)
    fs.pipe_file("bucket/lsun/0/a.webp", data)
    proxy.rate = 0.3
    for _ in range(4):
        s3fs.S3FileSystem.clear_instance_cache()  # no listing is remembered
        remote = config.replace(source="ffhq", source_url="s3://bucket/ffhq", split="ldm", retries=10)
        source = open_source(remote)
        assert source.info("00000.png") == {"licence": "BY"} and source.md5 == {"00000.png": "0" * 32}
        open_source(config.replace(source="lsun", source_url="s3://bucket/lsun", retries=10))
    assert proxy.num_failures >= 5, f"{proxy.num_failures} of {proxy.num_requests} failed: nothing was tested"


def test_a_split_list_that_cannot_be_read_is_named_itself(proxy, no_other_retries, config):
    fsspec.filesystem("s3").pipe_file("bucket/val.txt", b"000.png\n")
    proxy.rate = 1.0
    with pytest.raises(UserError, match="^reading s3://bucket/val.txt failed 6 times"):
        preprocess(config.replace(val_list="s3://bucket/val.txt"))


def test_an_endpoint_that_stays_broken_is_one_line(proxy, no_other_retries, config):
    proxy.rate = 1.0
    with pytest.raises(UserError, match="s3://bucket/out.* failed 6 times") as error:
        preprocess(config.replace(dest="s3://bucket/out", retries=2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["source", "dest"])
@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AccessDenied"])
def test_refused_credentials_are_one_line(proxy, no_other_retries, pictures, tmp_path, capsys, place, code):
    fsspec.filesystem("s3").pipe_file("bucket/in/a.png", (pictures / "000.png").read_bytes())
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.refusal = (403, code)
    places = ["s3://bucket/in", str(tmp_path / "out")] if place == "source" else [str(pictures), "s3://bucket/out"]
    for argv in (["folder", *places, "--size", "16"], ["check", places[0]]):
        status = main([*argv, "--retries", "2"])
        lines = capsys.readouterr().err.strip().splitlines()
        if place == "dest" and argv[0] == "check":
            continue
        assert status == 2 and lines[-1].startswith("latentzoom: error: ") and "s3://bucket" in lines[-1], lines
        assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("places", [("s3://missing/in", "out"), ("pictures", "s3://missing/out")])
def test_a_missing_bucket_is_one_line(proxy, no_other_retries, pictures, tmp_path, capsys, places):
    places = [place if "://" in place else str(tmp_path / place) for place in places]
    assert main(["folder", *places, "--size", "16", "--retries", "2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("latentzoom: error: ") and "missing" in error and "Traceback" not in error


def test_a_token_that_expires_in_the_middle_rejects_no_picture(proxy, no_other_retries, config, pictures, monkeypatch):
    fs = fsspec.filesystem("s3")
    for path in sorted(pictures.iterdir()):
        fs.pipe_file(f"bucket/in/{path.name}", path.read_bytes())
    config = config.replace(source_url="s3://bucket/in", policy="skip", retries=2)
    read = FolderSource.read

    def expiring(source, image):
        if image == "005.png":
            proxy.refusal = (403, "ExpiredToken")
        return read(source, image)

    monkeypatch.setattr(FolderSource, "read", expiring)
    with pytest.raises((UserError, PermissionError)):
        preprocess(config)
    proxy.refusal = None
    monkeypatch.setattr(FolderSource, "read", read)
    assert preprocess(config).num_samples == 11


def test_damage_on_s3_is_rebuilt_and_the_cache_stays_in_its_bounds(proxy, config, tmp_path):
    config = config.replace(dest="s3://bucket/out")
    preprocess(config)
    before = _remote_tree(config.dest)
    fs = fsspec.filesystem("s3")
    fs.pipe_file("bucket/out/shard-000001.tar", before["shard-000001.tar"][:-1] + b"x")
    assert verify(config.dest).damaged_files == ["shard-000001.tar"]
    with ShardLoader(config.dest, batch_size=11, cache_dir=str(tmp_path / "cache")) as loader:
        with pytest.raises(UserError, match="shard-000001.tar is damaged"):
            next(iter(loader))
    assert preprocess(config).num_shards_kept == 2
    assert _remote_tree(config.dest) == before
    largest = max(entry["bytes"] for entry in json.loads(before["manifest.json"])["shards"])
    options = {"batch_size": 11, "cache_dir": str(tmp_path / "small"), "cache_bytes": largest}
    with ShardLoader(config.dest, **options) as loader:
        assert sorted(next(iter(loader)).ids) == [f"{n:03d}.png" for n in range(11)]
    assert sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) <= largest


def test_a_damaged_cached_shard_is_fetched_again(proxy, config, tmp_path):
    config = config.replace(dest="s3://bucket/out")
    preprocess(config)
    options = {"batch_size": 11, "cache_dir": str(tmp_path / "cache"), "shuffle": False}
    with ShardLoader(config.dest, **options) as loader:
        expected = next(iter(loader))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-600])
    with ShardLoader(config.dest, **options) as loader:
        assert next(iter(loader)).pixels.equal(expected.pixels)


def test_places_and_endpoints_that_cannot_be_are_one_line(proxy, pictures, capsys, monkeypatch):
    for source, dest in (("s3://", "out"), (str(pictures), "s3://"), (str(pictures), "s3:///")):
        assert main(["folder", source, dest, "--size", "8", "--retries", "1"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("latentzoom: error: ") and "s3:" in error
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    assert main(["folder", "s3://bucket/in", "out", "--size", "8", "--retries", "1"]) == 2
    assert "Invalid endpoint: nowhere; check the address" in capsys.readouterr().err
