"""Kills, damage and full disks: never a half shard, always named, always mended by running again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.bundle import Bundle, save_bundle
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from preprocess.cli import main
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader
from preprocess.shards.manifest import load_manifest
from preprocess.shards.publish import sole_run
from preprocess.shards.ustar import read_index
from preprocess.shards.verify import verify
from tests.preprocess.conftest import make_pictures, read_tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_at_20_random_moments_the_bytes_are_the_same(tmp_path):
    make_pictures(tmp_path / "pictures", 20)
    program = Path(__file__).with_name("killer.py")
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "pictures"), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("killed 20, finished ")


@pytest.fixture
def shards(config, autoencoder):
    """A finished set of three shards, and the path of the middle one."""
    preprocess(config.replace(lr_sizes=(4,)), autoencoder=autoencoder)
    return Path(config.dest)


def _boundaries(path: Path) -> list[int]:
    """Every offset at which a member's header starts, and the end of the last member."""
    index = read_index(path)
    ends = [offset + length + -length % 512 for _, offset, length in index]
    return [offset - 512 for _, offset, _ in index] + ends[-1:]


def test_a_cut_at_every_member_boundary_is_found(shards):
    path = shards / "shard-000001.tar"
    whole = path.read_bytes()
    boundaries = _boundaries(path)
    assert len(boundaries) == 5 * 6 + 1
    for boundary in boundaries:
        path.write_bytes(whole[:boundary])
        assert verify(str(shards)).damaged_files == ["shard-000001.tar"]
        with pytest.raises((ValueError, tarfile.TarError)):
            read_index(path)


def test_a_flipped_byte_in_every_member_is_found_by_verify_and_loader(shards):
    path = shards / "shard-000001.tar"
    whole = path.read_bytes()
    for _, offset, length in read_index(path):
        path.write_bytes(whole[: offset + length // 2] + bytes([whole[offset + length // 2] ^ 1]) +
                         whole[offset + length // 2 + 1 :])  # fmt: skip
        assert verify(str(shards)).damaged_files == ["shard-000001.tar"]
    with (
        ShardLoader(str(shards), batch_size=11) as loader,
        pytest.raises(UserError, match="shard-000001.tar is damaged"),
    ):
        next(iter(loader))


@pytest.mark.parametrize(
    "name", ["shard-000001.tar", "shard-000002.json", "rejects.jsonl", "sources.txt.gz", "plan.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_rerun_rebuilds_exactly_what_is_damaged(shards, config, autoencoder, name, damage, capfd):
    config = config.replace(lr_sizes=(4,))
    tree = read_tree(shards)
    times = {p.name: p.stat().st_mtime_ns for p in shards.glob("shard-*.tar")}
    path, data = shards / name, (shards / name).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else bytes([*data[: len(data) // 2], 1, *data[len(data) // 2 :]]))
    preprocess(config, autoencoder=autoencoder)
    assert read_tree(shards) == tree
    rebuilt = {p.name for p in shards.glob("shard-*.tar") if p.stat().st_mtime_ns != times[p.name]}
    assert rebuilt == ({Path(name).with_suffix(".tar").name} if name.startswith("shard") else set())


def test_verify_prints_each_damaged_file_and_its_exit_code_says_so(shards, capsys):
    assert main(["verify", str(shards)]) == 0
    (shards / "shard-000000.tar").unlink()
    receipt = shards / "shard-000002.json"
    receipt.write_text(receipt.read_text().replace('"num_samples":1', '"num_samples":2'))
    (shards / "shard-000077.tar").write_bytes(b"")
    assert main(["verify", str(shards)]) == 1
    lines = capsys.readouterr().out
    for named in ("shard-000000.tar: is missing", "shard-000002.json: ", "shard-000077.tar: is not in the manifest"):
        assert f"damaged: {named}" in lines
    (shards / "manifest.json").unlink()
    assert main(["verify", str(shards)]) == 2


def _run_on_small_disk(tmp_path: Path, prepare: str, dest: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`preprocess folder` with a disk of 300 KB, in a name space of its own. What the disk's folder `out` then holds is
    copied to tmp_path/out."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=300k tmpfs "$1"'
    probe = ["unshare", "-rm", "sh", "-c", mount, "sh", str(disk)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small file system")
    script = (
        f'{mount} && {prepare}; python="$0" disk="$1" pictures="$2" out="$3"; shift 3; '
        f'TMPDIR="$disk" "$python" -m preprocess folder "$pictures" {dest} --size 64 "$@"; code=$?; '
        'ls -A "$disk" >&2; test -d "$disk/out" && cp -r "$disk/out" "$out"; exit $code'
    )
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, str(disk), str(tmp_path / "pictures"),
         str(tmp_path / "out"), *options],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("when", ["shards", "plan", "quarantine"])
def test_a_full_disk_is_one_line_and_leaves_whole_shards_only(tmp_path, when):
    make_pictures(tmp_path / "pictures", 60, 80, 80)
    if when == "quarantine":
        for number in range(30):
            (tmp_path / "pictures" / f"{number:03d}-bad.png").write_bytes(bytes(20_000))
    prepare = 'head -c 400000 /dev/zero > "$1/filler"' if when == "plan" else "true"
    options = ["--samples-per-shard", "8", "--policy", "quarantine", "--max-reject-fraction", "1"]
    result = _run_on_small_disk(tmp_path, prepare, '"$disk/out"', *options)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    message = next(line for line in lines if line.startswith("latentzoom: error: "))
    assert "no space left while writing to" in message and "run again" in message and "Traceback" not in result.stderr
    out = tmp_path / "out"
    tars = sorted(path.name for path in out.glob("shard-*.tar"))
    assert (not tars) if when == "plan" else 1 <= len(tars) < 8
    for name in tars:
        read_index(out / name)
    left = [path.name for path in out.rglob("*") if path.name.startswith((".", "latentzoom-"))]
    assert not left
    assert main(["folder", str(tmp_path / "pictures"), str(out), "--size", "64", *options]) == 0
    assert verify(str(out)).num_samples == 60


def test_a_full_temporary_folder_is_named_where_the_destination_is_remote(tmp_path):
    make_pictures(tmp_path / "pictures", 60, 80, 80)
    result = _run_on_small_disk(tmp_path, "true", "memory://bucket/out", "--samples-per-shard", "60")
    assert result.returncode == 2, result.stderr
    assert f"error: no space left in {tmp_path}/disk, where shards grow before they go to memory://" in result.stderr
    assert "TMPDIR" in result.stderr and "Traceback" not in result.stderr


def test_shards_without_a_plan_are_not_overwritten(config):
    Path(config.dest).mkdir()
    (Path(config.dest) / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds shards but no plan.json"):
        preprocess(config)


def test_a_second_run_into_the_same_destination_is_refused(config):
    with sole_run(config.dest), pytest.raises(UserError, match="another run is writing to"):
        preprocess(config)
    assert preprocess(config).num_samples == 11


def test_rejects_of_an_earlier_run_still_count(config, pictures):
    (pictures / "000.png").write_bytes(b"junk")
    lenient = config.replace(policy="skip", max_reject_fraction=0.5)
    assert preprocess(lenient).num_rejected == 1
    for strict in (lenient.replace(max_reject_fraction=0.01, max_rejects=0), lenient.replace(policy="fail")):
        with pytest.raises(UserError, match="1 of 11 images rejected"):
            preprocess(strict)


def test_the_autoencoder_of_a_bundle_is_used(config, autoencoder, tmp_path):
    model = ModelConfig(image_size=16, autoencoder=autoencoder.config)
    save_bundle(str(tmp_path / "bundle"), Bundle(model, autoencoder))
    preprocess(config.replace(autoencoder=str(tmp_path / "bundle")))
    assert load_manifest(config.dest).autoencoder_identity == autoencoder.identity()
    with pytest.raises(UserError, match="no bundle at"):
        preprocess(config.replace(autoencoder=str(tmp_path / "nowhere")))


def test_not_finite_latents_are_an_error_that_names_sample_and_way_out(config, autoencoder):
    class Exploding:
        config = autoencoder.config

        def identity(self):
            return "x"

        def moments(self, image):
            return autoencoder.moments(image) * 1e6

    with pytest.raises(UserError, match=r"png: .*latent.npy is not finite in float16; try --dtype float32"):
        preprocess(config, autoencoder=Exploding())
    assert not list(Path(config.dest).glob("shard-*"))


def test_command_line_errors_are_one_line(capsys, pictures, tmp_path):
    for argv, named in (
        (["nonsense"], "unknown source 'nonsense'"),
        (["folder", str(tmp_path / "none"), str(tmp_path / "out")], "is not a folder"),
        (["folder", str(pictures), str(tmp_path / "out"), "--size", "3"], "--size 3 is not allowed"),
        (["folder", str(pictures), str(tmp_path / "out"), "--lr-sizes", "999"], "--lr-sizes = 999"),
        (["folder", str(pictures), str(tmp_path / "out"), "--lr-sizes", "8,8"], "each size once"),
        (["folder", str(pictures), str(tmp_path / "out"), "--device", "foo"], "--device = 'foo' is not allowed"),
        (["folder", str(pictures), str(tmp_path / "out"), "--decode-threads", "-3"], "--decode-threads -3"),
        (["folder", str(pictures), str(tmp_path / "out"), "--encode-threads", "-3"], "--encode-threads -3"),
        (["folder", str(pictures), str(tmp_path / "out"), "--val-list", str(tmp_path)], "is a folder; give a file"),
        (["folder", str(pictures), str(pictures / "000.png")], "000.png: File exists; choose another destination"),
        (["folder", str(pictures), str(pictures / "000.png" / "x")], "Not a directory; choose another destination"),
        (["folder", str(pictures), "/proc/none/out"], "cannot make the folder /proc/none/out"),
        (["folder", str(pictures), "/proc"], "cannot write to /proc: "),
        (["verify", str(tmp_path)], "holds no manifest.json"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("latentzoom: error: ") and named in error and "\n" not in error


def test_plan_prints_and_writes_nothing(capsys, pictures, tmp_path):
    before = read_tree(tmp_path)
    argv = [
        "folder",
        str(pictures),
        str(tmp_path / "out"),
        "--size",
        "16",
        "--shard-bytes",
        "8000",
        "--batch-size",
        "2",
    ]
    assert main([*argv, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "11 images" in text and "samples    11 of 16x16 (train 11)" in text and "time       about" in text
    assert read_tree(tmp_path) == before
    assert main([*argv, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert f"shards     {summary['num_shards']} of" in text and summary["num_shards"] > 2
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert max(sizes) < 8000 + 10240
    assert (
        main([*argv, "--json"]) == 0 and json.loads(capsys.readouterr().out)["num_shards_kept"] == summary["num_shards"]
    )
