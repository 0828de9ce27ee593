"""One table of situations and what is right in each, through every door: the command, Python, the served model."""

import base64
import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from test_upscale import rgb_profile

from orchestration.cli import main
from orchestration.registry.served_model import BadRequest, ServedModel
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.starter import starter_path

DOORS = ("command", "python", "served")


@pytest.fixture(scope="module")
def starter():
    return LatentZoom.starter()


@pytest.fixture(scope="module")
def served(starter):
    model = ServedModel()
    model.load_context(SimpleNamespace(artifacts={"bundle": starter_path()}))
    return model


@pytest.fixture
def ask(starter, served, tmp_path):
    """(door, the file's bytes, options) → the enlarged picture. Raises `UserError` or `BadRequest` with one line."""

    def through(door, data, scale=None, size=None):
        if door == "python":
            return starter.upscale(data, scale, size=size)
        if door == "served":
            row = {"task": "upscale", "image": base64.b64encode(data).decode(), "scale": scale}
            row |= {} if size is None else {"height": size[0], "width": size[1]}
            answer = served.predict(None, pd.DataFrame([row]))
            return Image.open(io.BytesIO(base64.b64decode(answer["png"][0])))
        return command(data, tmp_path, scale, size)

    return through


def command(data, folder, scale=None, size=None, target="out.png"):
    (folder / "in").write_bytes(data)
    words = ["--scale", str(scale)] if size is None else ["--size", f"{size[0]}x{size[1]}"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(
            ["upscale", "--device", "cpu", "--overwrite", *words, str(folder / "in"), "-o", str(folder / target)]
        )
    if status:
        raise UserError(said.getvalue().strip().splitlines()[-1])
    with Image.open(folder / target) as image:
        image.load()
    return image


def photo(height=14, width=21, seed=0, mode="RGB"):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(image, form="PNG", **options):
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo().transpose(Image.Transpose.ROTATE_90), exif=exif)


def deep_grey():
    return saved(Image.fromarray(np.full((14, 21), 135 * 257, np.uint16)))


def hidden_colours():
    pixels = np.zeros((14, 21, 4), np.uint8)
    pixels[..., 3] = np.where(np.arange(21) < 11, 255, 0)
    pixels[..., :3] = np.where(pixels[..., 3:] > 0, (220, 30, 30), (0, 255, 0))
    return saved(Image.fromarray(pixels))


def palette():
    return saved(photo().quantize(16))


def tiff_in_planes():
    tifffile.imwrite(buffer := io.BytesIO(), np.moveaxis(np.asarray(photo()), 2, 0), photometric="rgb", planarconfig=2)
    return buffer.getvalue()


def cmyk():
    return saved(photo().convert("CMYK"), "JPEG", quality=95)


@dataclass(frozen=True)
class Case:
    """data: what makes the file. mode: of the result. shown: what a viewer shows of the file, for comparison with the
    result shrunk again; None where Pillow's own reading would be wrong and `check` says what is right."""

    name: str
    data: object
    mode: str
    check: object = None


CASES = [
    Case("RGB", lambda: saved(photo()), "RGB"),
    Case("grey", lambda: saved(photo(mode="L")), "L"),
    Case("grey and alpha", lambda: saved(photo(mode="LA")), "LA"),
    Case("black and white", lambda: saved(photo(mode="L").point(lambda v: 255 * (v > 120), "1")), "L"),
    Case("turned by EXIF", turned, "RGB"),
    Case("16-bit grey", deep_grey, "L", lambda made: abs(made.mean() - 135) < 2),
    Case("with a profile", lambda: saved(photo(), icc_profile=rgb_profile()), "RGB"),
    Case("hidden colours", hidden_colours, "RGBA", lambda made: made[made[..., 3] > 0][:, 1].max() < 45),
    Case("palette", palette, "RGB"),
    Case("equal parts", lambda: saved(photo(mode="L").convert("RGB")), "RGB", lambda made: not np.ptp(made, 2).any()),
    Case("TIFF in planes", tiff_in_planes, "RGB"),
    Case("CMYK", cmyk, "RGB"),
    Case("WebP", lambda: saved(photo(), "WEBP", lossless=True), "RGB"),
    Case("AVIF", lambda: saved(photo(), "AVIF", quality=95), "RGB"),
    Case("animated", lambda: saved(photo(), "PNG", save_all=True, append_images=[photo(seed=5)]), "RGB"),
    Case("one pixel", lambda: saved(photo(1, 1)), "RGB"),
    Case("a line", lambda: saved(photo(1, 90)), "RGB"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_picture_is_right_through_every_door(ask, case):
    data = case.data()
    made = {door: ask(door, data, 2.5) for door in DOORS}
    pixels = {door: np.asarray(image).astype(int) for door, image in made.items()}
    for door in DOORS:
        assert made[door].mode == case.mode, door
        assert np.abs(pixels[door] - pixels["python"]).max() <= 1, door
        assert case.check is None or case.check(pixels[door]), door
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert made["python"].size == tuple(max(1, round(side * 2.5)) for side in shown.size)
    if case.check is None:  # enlarged and shrunk again it is what Pillow shows
        small = made["python"].convert("RGB").resize(shown.size, Image.Resampling.BOX)
        difference = np.abs(np.asarray(small).astype(float) - np.asarray(shown.convert("RGB")).astype(float))
        assert difference.mean() < 12


MISTAKES = [
    ("cut short", lambda: saved(photo(60, 90), "PNG")[:-700], {"scale": 2}, "cannot be read as a picture: damaged"),
    ("text", lambda: b"some text", {"scale": 2}, "cannot be read as a picture: not_an_image"),
    ("a blank", lambda: b" ", {"scale": 2}, "cannot be read as a picture"),
    ("floats", lambda: saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), {"scale": 2}, "unsupported"),
    ("scale 0", lambda: saved(photo()), {"scale": 0}, "0"),
    ("negative", lambda: saved(photo()), {"scale": -2.0}, "-2"),
    ("no number", lambda: saved(photo()), {"scale": float("inf")}, "inf"),
    ("no size", lambda: saved(photo()), {"size": (0, 5)}, "0"),
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_mistake_is_one_line_through_every_door(ask, mistake, door):
    _, data, options, words = mistake
    with pytest.raises((UserError, BadRequest)) as error:
        ask(door, data(), **options)
    text = error.value.message if isinstance(error.value, BadRequest) else str(error.value)
    assert words in text and "\n" not in text and "Traceback" not in text


# --- fuzzed -----------------------------------------------------------------------------------------------------------

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "AVIF": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "BMP": ["1", "L", "P", "RGB"],
    "GIF": ["L", "P"],
    "PPM": ["1", "L", "RGB"],
}


@st.composite
def files(draw):
    """(format, mode, bytes) of a picture of any shape, mode and profile, turned or not."""
    form = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[form]))
    image = photo(draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(0, 9)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(image.convert("L").point(lambda v: 0 if v < 90 else v))
    else:
        image = image.convert(mode)
    options = {}
    if form in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(1, 8))
        options["exif"] = exif
        if mode in ("RGB", "RGBA") and draw(st.booleans()):
            options["icc_profile"] = rgb_profile()
    if form == "WEBP":
        options |= {"lossless": True, "exact": True}
    return form, mode, saved(image, form, **options)


def as_pillow_reads(data):
    """(H,W,3) and alpha of a file by Pillow alone: upright, in 8 bits."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A")
    return np.asarray(image.convert("RGB")).astype(int), np.asarray(alpha).astype(int)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(files())
def test_fuzz_no_picture_is_read_otherwise_than_pillow_reads_it(made):
    from pipeline.reading import oriented_size, read_picture

    form, mode, data = made
    picture = read_picture(data)
    assert oriented_size(data, 10**6) == picture.size, (form, mode)
    colour, alpha = as_pillow_reads(data)
    assert np.abs(np.asarray(picture.image.convert("RGB")).astype(int) - colour).max() <= 1, (form, mode)
    found = np.full(alpha.shape, 255) if picture.alpha is None else np.asarray(picture.alpha)
    assert np.array_equal(found, alpha), (form, mode)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(files(), min_size=1, max_size=3),
    st.sampled_from(["--scale 0.4", "--scale 1", "--scale 2.7", "--size 5x31", "--width 9", "--height 1",
                     "--megapixels 0.001", "--longest 33"]),
    st.sampled_from(["", "--format jpg", "--format webp --quality 100", "--format avif --quality 1", "--format tif"]),
    st.sampled_from(["", "--tile 3", "--look sharp", "--dtype float32 --overwrite", "--steps 0 --seed 5"]),
)  # fmt: skip
def test_fuzz_no_traceback_and_no_file_lost(made, size, form, more):
    """A folder of any pictures and one text, enlarged with any options, twice: every picture has its result, nothing
    else changes, and the second time nothing is done."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for index, (kind, _, data) in enumerate(made):
            (folder / "in" / f"p{index}.{kind.lower()}").write_bytes(data)
        (folder / "in" / "notes.txt").write_text("text")
        before = {file.name: file.read_bytes() for file in (folder / "in").iterdir()}
        words = [*size.split(), *form.split(), *more.split(), str(folder / "in"), str(folder / "out")]
        times = []
        for _ in range(2):
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                assert main(["upscale", "--device", "cpu", *words]) == 0, said.getvalue()
            times.append({file.name: file.stat().st_mtime_ns for file in (folder / "out").iterdir()})
        assert times[0] == times[1] and len(times[0]) == len(made)
        assert {file.name: file.read_bytes() for file in (folder / "in").iterdir()} == before
        for file in (folder / "out").iterdir():
            with Image.open(file) as image:
                image.load()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from(["a.png", "b.png", "in", "out", "out/", "new.png", "none.png", "text.txt", "-o", "--overwrite",
                         "--scale", "2", "--size", "3x4", "--width", "0", "--format", "gif", "a.png/x", "", "--tile",
                         "--dtype", "int8", "--look", "blurred", "--quality", "nan"]),
        max_size=7,
    )
)  # fmt: skip
def test_fuzz_nonsense_is_refused_without_harm(words):
    """Whatever is typed: an exit status, no traceback, and what was there is there."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        Path("in").mkdir()
        for index, file in enumerate(("a.png", "b.png", "in/c.png")):
            photo(3, 4, index).save(file)
        Path("text.txt").write_text("text")
        there = ["a.png", "b.png", "in/c.png", "text.txt"]
        before = {file: Path(file).read_bytes() for file in there}
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(["upscale", "--device", "cpu", *words])
            except SystemExit as end:
                status = end.code
        assert status in (0, 1, 2)
        said = {"-o", "--overwrite"} <= set(words)
        assert said or {file: Path(file).read_bytes() for file in there} == before


def test_the_profile_of_the_fuzz_is_one():
    assert ImageCms.ImageCmsProfile(io.BytesIO(rgb_profile())).profile.xcolor_space.strip() == "RGB"
