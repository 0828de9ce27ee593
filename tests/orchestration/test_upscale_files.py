"""Files as people who upscale pictures expect them: formats, sizes with the aspect kept, many inputs, folders, URLs."""

import shutil

import fsspec
import numpy as np
import pytest
import tifffile
from PIL import Image

from orchestration.cli import main
from orchestration.pictures import output
from orchestration.pictures.places import places
from orchestration.pictures.wanted_size import WantedSize
from pipeline.canvas import read_text
from pipeline.errors import UserError
from pipeline.model import LatentZoom


def photo(height=20, width=30, seed=0, mode="RGB"):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def upscale(*words):
    return main(["upscale", "--device", "cpu", *map(str, words)])


def opened(file):
    with Image.open(file) as image:
        image.load()
    return image


@pytest.fixture(scope="module")
def starter():
    return LatentZoom.starter()


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jpg", "webp", "avif", "png", "tif"])
def test_every_format_holds_the_same_picture_with_profile_exif_and_origin(starter, tmp_path, form):
    from test_upscale import rgb_profile

    exif = Image.Exif()
    exif[271], exif[0x0112] = "Maker", 6
    source = tmp_path / f"in.{form}"
    photo().save(source, exif=exif, icc_profile=rgb_profile(), **({} if form in ("png", "tif") else {"quality": 95}))
    assert upscale("--scale", 2, source, tmp_path / "out/") == 0
    made = opened(tmp_path / "out" / f"in.{form}")  # its own format
    assert made.format == {"jpg": "JPEG", "tif": "TIFF"}.get(form, form.upper())
    right = np.asarray(starter.upscale(source, 2)).astype(int)
    difference = np.abs(np.asarray(made.convert("RGB")).astype(int) - right)
    assert made.size == (40, 60) and difference.mean() < (3 if form in ("jpg", "webp", "avif") else 0.1)
    assert made.getexif()[271] == "Maker" and made.getexif().get(0x0112, 1) == 1
    assert made.info["icc_profile"] == rgb_profile()
    text = read_text(tmp_path / "out" / f"in.{form}")
    assert text["Software"] == "latentzoom" and text["latentzoom:size"] == "60x40"


def test_quality_decides_the_bytes_and_100_is_lossless_webp(starter, tmp_path):
    photo(60, 90).save(tmp_path / "in.png")
    sizes = {}
    for form in ("jpg", "webp", "avif"):
        for quality in (30, 95):
            file = tmp_path / f"{quality}.{form}"
            assert upscale("--scale", 2, "--quality", quality, tmp_path / "in.png", file) == 0
            sizes[form, quality] = file.stat().st_size
        assert sizes[form, 30] < 0.7 * sizes[form, 95]
    assert upscale("--scale", 2, "--quality", 100, tmp_path / "in.png", tmp_path / "all.webp") == 0
    right = np.asarray(starter.upscale(tmp_path / "in.png", 2)).astype(int)
    assert np.abs(np.asarray(opened(tmp_path / "all.webp")).astype(int) - right).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_kept_or_laid_over_white_with_a_line(tmp_path, capsys, mode):
    picture = photo(mode="RGB").convert(mode)
    picture.putalpha(0)
    picture.paste(photo(8, 8).convert(mode), (10, 6))
    picture.save(tmp_path / "in.png")
    for form in ("webp", "avif", "tif"):
        assert upscale("--scale", 2, tmp_path / "in.png", tmp_path / f"out.{form}") == 0
        alpha = np.asarray(opened(tmp_path / f"out.{form}").convert("RGBA").getchannel("A"))
        assert alpha[0, 0] == 0 and alpha[20, 28] == 255
    assert "laid over white" not in capsys.readouterr().err
    assert upscale("--scale", 2, tmp_path / "in.png", tmp_path / "out.jpg") == 0
    assert "JPEG cannot be: what shows is laid over white" in capsys.readouterr().err
    corner = np.asarray(opened(tmp_path / "out.jpg").convert("L"))[:4, :4]
    assert corner.min() > 250


@pytest.mark.parametrize("form", ["jpg", "webp", "avif"])
def test_grey_comes_back_grey(tmp_path, form):
    photo(mode="L").save(tmp_path / "in.png")
    assert upscale("--scale", 2, tmp_path / "in.png", tmp_path / f"out.{form}") == 0
    made = np.asarray(opened(tmp_path / f"out.{form}").convert("RGB")).astype(int)
    assert (opened(tmp_path / f"out.{form}").mode == "L") == (form == "jpg")
    assert (made.max(2) - made.min(2)).max() <= 1


def test_three_equal_channels_come_back_without_a_tint(tmp_path):
    photo(mode="L").convert("RGB").save(tmp_path / "in.png")
    assert upscale("--scale", 2.5, tmp_path / "in.png", tmp_path / "out.png") == 0
    made = np.asarray(opened(tmp_path / "out.png"))
    assert made.shape[2] == 3 and (made == made[..., :1]).all() and made.std() > 20


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--width", "45"], (30, 45)),
        (["--height", "45"], (45, 68)),
        (["--longest", "90"], (60, 90)),
        (["--megapixels", "0.0054"], (60, 90)),
        (["--size", "31x17"], (31, 17)),
        (["--scale", "1.5"], (30, 45)),
    ],
)
def test_sizes_keep_the_aspect_unless_both_sides_are_given(tmp_path, option, expected):
    photo().save(tmp_path / "in.png")
    assert upscale(*option, tmp_path / "in.png", tmp_path / "out.png") == 0
    made = opened(tmp_path / "out.png")
    assert (made.height, made.width) == expected


def test_a_thin_picture_keeps_a_pixel():
    assert WantedSize(longest=10).of((1, 5000)) == (1, 10)
    assert WantedSize(width=7).of((5000, 1)) == (35000, 7)
    with pytest.raises(UserError, match="height and width must be whole numbers"):
        WantedSize(scale=1e9).of((10, 10))


# --- several inputs, folders ------------------------------------------------------------------------------------------


def test_several_pictures_and_a_folder_to_write_to(tmp_path, capsys):
    photo(seed=1).save(tmp_path / "a.png")
    photo(seed=2).save(tmp_path / "b.jpg")
    (tmp_path / "more").mkdir()
    photo(seed=3).save(tmp_path / "more" / "c.webp")
    words = ["--scale", 2, tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "more"]
    assert upscale(*words, tmp_path / "out") == 0
    assert upscale(*words, "-o", tmp_path / "other") == 0
    for folder in ("out", "other"):
        assert sorted(f.name for f in (tmp_path / folder).iterdir()) == ["a.png", "b.jpg", "c.webp"]
    assert opened(tmp_path / "out" / "b.jpg").size == (60, 40)


def test_two_pictures_are_never_input_and_output_unless_said(tmp_path, monkeypatch, capsys):
    """What a shell makes of *.png in a folder with two pictures, whatever else is said."""
    monkeypatch.chdir(tmp_path)
    photo(seed=1).save("a.png")
    photo(seed=2).save("b.png")
    before = (tmp_path / "b.png").read_bytes()
    for more in ([], ["--overwrite"]):
        assert upscale("--scale", 2, *more, "a.png", "b.png") == 2
        assert "give a folder at the end (out/)" in capsys.readouterr().err
    assert upscale("--scale", 2, "a.png", "-o", "b.png") == 2  # said, and yet another's
    assert "b.png is there already, and no result of this command; --overwrite" in capsys.readouterr().err
    assert (tmp_path / "b.png").read_bytes() == before
    assert upscale("--scale", 2, "a.png", "-o", "b.png", "--overwrite") == 0
    assert opened("b.png").size == (60, 40)


def test_what_is_the_same_continues_and_what_is_anothers_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(["a.png", "b.png"]):
        photo(seed=seed).save(tmp_path / "in" / name)
    folders = [tmp_path / "in", tmp_path / "out"]
    assert upscale("--scale", 2, *folders) == 0
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert upscale("--scale", 2, *folders) == 0 and upscale("--size", "40x60", *folders) == 0  # the same pictures
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == times
    capsys.readouterr()
    for words, why in (
        (["--scale", 3], "made with size 40x60, not 60x90"),
        (["--scale", 2, "--look", "sharp"], "made by another model"),
        (["--scale", 2, "--dtype", "bfloat16"], "made with dtype float32, not bfloat16"),
    ):
        assert upscale(*words, *folders) == 2
        said = capsys.readouterr().err
        assert why in said and "and so are 1 more; --overwrite replaces" in said
    photo(seed=9).save(tmp_path / "in" / "a.png")
    assert upscale("--scale", 2, *folders) == 2
    assert "a.png is there already, made of another picture" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == times
    assert upscale("--scale", 2, "--overwrite", *folders) == 0
    assert [f.name for f, t in times.items() if f.stat().st_mtime_ns != t] == ["a.png"]  # b.png was the same


def test_the_same_command_again_says_that_it_is_done(tmp_path, capsys):
    photo().save(tmp_path / "in.png")
    assert upscale("--scale", 2, tmp_path / "in.png", tmp_path / "out.jpg") == 0
    assert upscale("--scale", 2, tmp_path / "in.png", tmp_path / "out.jpg") == 0
    assert "made by this very command" in capsys.readouterr().out
    assert upscale("--scale", 2, "--quality", 80, tmp_path / "in.png", tmp_path / "out.jpg") == 2
    assert "made with quality 95, not 80" in capsys.readouterr().err
    assert upscale("--scale", 2, "--quality", 80, "--overwrite", tmp_path / "in.png", tmp_path / "out.jpg") == 0


def test_folders_find_every_kind_of_picture_and_say_what_was_left_out(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    photo().save(folder / "a.jfif", "JPEG")
    photo().save(folder / "b.avif")
    photo().save(folder / "c.ppm")
    photo().save(folder / "d", "WEBP")
    photo().save(folder / "e.GIF")
    (folder / "._a.jfif").write_bytes(b"\0\5\26\7 of a Mac")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "notes.txt").write_text("text")
    (folder / "README").write_text("text")
    (folder / "new.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert upscale("--scale", 2, folder, tmp_path / "out") == 0
    names = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert names == ["a.jfif", "b.avif", "c.png", "d.webp", "e.png"]
    assert [opened(tmp_path / "out" / n).format for n in names] == ["JPEG", "AVIF", "PNG", "WEBP", "PNG"]
    said = capsys.readouterr().err
    assert "left out 3 files that are no pictures" in said and "1 .heic" in said and "1 without suffix" in said
    assert upscale("--scale", 2, folder, tmp_path / "out", "--quiet") == 0
    assert not capsys.readouterr().err


def test_results_that_would_meet_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        photo().save(tmp_path / name / "a.png")
    with pytest.raises(UserError, match="would both become a.png"):
        places([str(tmp_path / "one" / "a.png"), str(tmp_path / "two" / "a.png")], "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.png", "a.png"], "^a.png is given twice; name it once$"),
        (["b.png", "a.png", "./a.png"], r"^a.png and \./a.png are the same picture; name it once$"),
        (["in", "in/c.png"], "^in/c.png is given twice; name it once$"),
    ],
)
def test_a_picture_given_twice_is_named(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png", "in/c.png"):
        photo().save(tmp_path / name)
    with pytest.raises(UserError, match=said):
        places(words, "out/")


# --- frames, precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gif", "png", "webp", "avif", "tif"])
def test_of_several_frames_the_first_comes_with_a_line(starter, tmp_path, capsys, form):
    frames = [photo(seed=seed) for seed in range(3)]
    file = tmp_path / f"in.{form}"
    if form == "tif":
        tifffile.imwrite(file, np.stack([np.asarray(f) for f in frames]), photometric="rgb")
    else:
        lossless = {"lossless": True} if form == "webp" else {}
        frames[0].save(file, save_all=True, append_images=frames[1:], duration=50, **lossless)
    assert upscale("--scale", 2, file, tmp_path / "out.png") == 0
    assert "has several frames or pages; only the first is enlarged" in capsys.readouterr().err
    right = np.asarray(starter.upscale(frames[0], 2)).astype(int)
    made = np.asarray(opened(tmp_path / "out.png").convert("RGB")).astype(int)
    assert np.abs(made - right).mean() < 12  # GIF has 256 colours
    frames[0].save(tmp_path / f"one.{form}")
    assert upscale("--scale", 2, tmp_path / f"one.{form}", tmp_path / "one-out.png") == 0
    assert "several frames" not in capsys.readouterr().err


def test_half_precision_without_its_instructions_is_said(tmp_path, capsys, monkeypatch):
    photo(6, 6).save(tmp_path / "in.png")
    for has_bf16, told in ((False, True), (True, False)):
        monkeypatch.setattr(output, "_cpu_has", lambda *flags, answer=has_bf16: answer)
        words = ["--scale", 2, "--dtype", "bfloat16", "--overwrite", tmp_path / "in.png", tmp_path / "out.png"]
        assert upscale(*words) == 0
        assert ("it is about ten times slower here than float32" in capsys.readouterr().err) == told


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_urls_in_and_out(tmp_path, capsys):
    fs = fsspec.filesystem("memory")
    photo(seed=1).save(tmp_path / "a.jpg")
    photo(seed=2).save(tmp_path / "b.png")
    for name in ("a.jpg", "deep/b.png"):
        fs.pipe_file(f"/pictures/{name}", (tmp_path / name.split("/")[-1]).read_bytes())
    fs.pipe_file("/pictures/notes.txt", b"text")
    try:
        assert upscale("--scale", 2, "memory://pictures/a.jpg", "memory://made/one.webp") == 0
        assert upscale("--scale", 2, "memory://pictures/a.jpg", tmp_path / "local.png") == 0
        for _ in range(2):
            assert upscale("--scale", 2, "memory://pictures", "memory://made/all") == 0
        assert sorted(fs.find("/made")) == ["/made/all/a.jpg", "/made/all/deep/b.png", "/made/one.webp"]
        with fs.open("/made/one.webp") as file:
            assert Image.open(file).size == (60, 40)
        assert upscale("--scale", 3, "memory://pictures", "memory://made/all") == 2
        assert "made with size 40x60, not 60x90" in capsys.readouterr().err
        assert upscale("--scale", 2, "memory://pictures/none.png", tmp_path / "x.png") == 2
        assert "no such file" in capsys.readouterr().err and not (tmp_path / "x.png").exists()
    finally:
        shutil.rmtree(tmp_path)
        fs.rm("/pictures", recursive=True)
        fs.rm("/made", recursive=True)
