"""`latentzoom generate` as a person types it: sizes, seeds, metadata, and one line for each mistake."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.cli import main
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.sizes import parse_size


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("generate") / "bundle")


def _generate(bundle, *more):
    return main(["generate", "--model", bundle, "--device", "cpu", "--steps", "3", *more])


def test_files_have_the_size_the_seed_and_the_model(bundle, tmp_path):
    assert (
        _generate(bundle, "--size", "20x33", "--num", "3", "--batch", "2", "--seed", "5", "--out", str(tmp_path)) == 0
    )
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"seed-00000{i}-20x33.png" for i in (5, 6, 7)]
    picture = Image.open(files[1])
    assert picture.size == (33, 20)
    assert picture.text["latentzoom:seed"] == "6"
    assert picture.text["latentzoom:model"].startswith("tiny sha256:")


@pytest.mark.parametrize("form", ["png", "tif", "jpg", "webp", "avif"])
def test_a_killed_run_goes_on_and_what_is_anothers_is_left(bundle, tmp_path, form, monkeypatch, capsys):
    sampled = []
    original = LatentZoom.sample_latents

    def sample(self, *arguments, **options):
        sampled.extend(options["seed"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(LatentZoom, "sample_latents", sample)
    words = ["--size", "20x33", "--num", "4", "--batch", "2", "--format", form, "--out", str(tmp_path)]
    assert _generate(bundle, *words) == 0
    (tmp_path / f"seed-000002-20x33.{form}").unlink()  # as after a kill
    before = (tmp_path / f"seed-000001-20x33.{form}").stat().st_mtime_ns
    sampled.clear()
    assert _generate(bundle, *words) == 0
    assert sampled == [2] and len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / f"seed-000001-20x33.{form}").stat().st_mtime_ns == before
    sampled.clear()
    (tmp_path / f"seed-000000-20x33.{form}").write_bytes(b"something else")
    assert _generate(bundle, *words) == 2
    assert "is there already, and no result of this command; --overwrite" in capsys.readouterr().err
    assert _generate(bundle, *words, "--sampler", "ddim", "--latent-size", "8x8") == 2
    assert "and so are 3 more" in capsys.readouterr().err and sampled == []
    assert (tmp_path / f"seed-000000-20x33.{form}").read_bytes() == b"something else"
    assert _generate(bundle, *words, "--sampler", "ddim", "--latent-size", "8x8", "--overwrite") == 0
    assert sampled == [0, 1, 2, 3]
    assert _generate(bundle, *words, "--sampler", "ddim") == 2  # without --latent-size it is another picture
    assert "made with latent 8x8, not left out" in capsys.readouterr().err


def test_one_file_at_another_size_is_another_picture(bundle, tmp_path, capsys):
    target = str(tmp_path / "one.png")
    assert _generate(bundle, "--size", "24", "--out", target) == 0
    assert _generate(bundle, "--size", "24", "--out", target) == 0
    assert _generate(bundle, "--size", "16", "--out", target) == 2
    assert "made with size 24x24, not 16x16" in capsys.readouterr().err and Image.open(target).size == (24, 24)


def test_an_image_depends_on_its_seed_alone(bundle, tmp_path):
    assert _generate(bundle, "--size", "24", "--num", "2", "--seed", "5", "--out", str(tmp_path / "both")) == 0
    assert _generate(bundle, "--size", "24", "--seed", "6", "--out", str(tmp_path / "one.png")) == 0
    both = np.asarray(Image.open(tmp_path / "both" / "seed-000006-24x24.png")).astype(int)
    one = np.asarray(Image.open(tmp_path / "one.png")).astype(int)
    assert np.abs(both - one).max() <= 1  # batched matrix products round differently


def test_half_precision_draws_the_same_picture(bundle, tmp_path):
    pictures = {}
    for dtype in ("float32", "bfloat16"):
        target = tmp_path / f"{dtype}.png"
        assert _generate(bundle, "--size", "24", "--dtype", dtype, "--out", str(target)) == 0
        pictures[dtype] = np.asarray(Image.open(target)).astype(int)
    difference = np.abs(pictures["float32"] - pictures["bfloat16"])
    assert 0 < difference.max() <= 8 and pictures["float32"].std() > difference.std()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0x5"], "height and width must be whole numbers"),
        (["--size", "axb"], "use height x width"),
        (["--num", "0"], "use 1 or more"),
        (["--num", "2", "--out", "a.png"], "needs a folder"),
        (["--out", "a.gif"], "give a folder, or a .png, .tif, .jpg, .webp or .avif file"),
        (["--out", "-"], "give a folder, or a .png, .tif, .jpg, .webp or .avif file"),
        (["--quality", "0"], "use 1 to 100"),
    ],
)
def test_mistakes_are_one_line(bundle, options, message, capsys):
    assert _generate(bundle, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("latentzoom: error: ")
    assert message in error


def test_a_missing_model_and_an_unwritable_folder(bundle, tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path / "nothing")]) == 2
    assert "no bundle at" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert _generate(bundle, "--size", "16", "--out", str(tmp_path / "file" / "below")) == 2
    assert "cannot write" in capsys.readouterr().err


def test_too_little_memory_names_the_seeds_and_the_way_out(bundle, tmp_path, capsys, monkeypatch):
    def sample_latents(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(LatentZoom, "sample_latents", sample_latents)
    assert _generate(bundle, "--num", "3", "--seed", "5", "--out", str(tmp_path)) == 2
    message = "error: seeds 5 to 7: the GPU has too little memory for it; give a smaller --batch"
    assert message in capsys.readouterr().err


def test_a_super_resolution_model_says_what_to_use(tmp_path, capsys):
    assert _generate(make_bundle(tmp_path / "sr", task="sr")) == 2
    assert "use `latentzoom upscale`" in capsys.readouterr().err


def test_sizes_are_height_by_width():
    assert parse_size("700x1000") == (700, 1000)
    assert parse_size("64") == (64, 64)
    with pytest.raises(UserError):
        parse_size("1x2x3")


def test_the_verb_table_is_complete(capsys):
    assert main(["--help"]) == 0
    assert "upscale" in capsys.readouterr().out
    assert main(["nothing"]) == 2
    assert "no verb 'nothing'" in capsys.readouterr().err
