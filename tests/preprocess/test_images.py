"""Hostile and odd images, each with its named outcome."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.errors import UserError
from preprocess.pictures.images import decode, oriented_size
from preprocess.rejects import Reject
from preprocess.run import preprocess
from tests.preprocess.conftest import read_tree

LIMIT = 10**6


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _photo(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((48, 36), Image.Resampling.BICUBIC).convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    idat = b"IDAT" + zlib.compress(b"\0" * 64)
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, idat)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _tiff_bomb() -> bytes:
    data = _bytes(Image.new("L", (1, 1)), "TIFF")
    for tag, value in ((256, 100_000), (257, 100_000), (278, 100_000)):
        start = next(i for i in range(len(data)) if data[i : i + 2] == struct.pack("<H", tag) and data[i + 3] == 0)
        data = data[:start] + struct.pack("<HHII", tag, 4, 1, value) + data[start + 12 :]
    return data


HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", "not_an_image"),
    "magic only": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "png cut": (_bytes(_photo(), "PNG")[:-700], "damaged"),
    "jpeg cut": (_bytes(_photo(), "JPEG")[:-300], "damaged"),
    "webp cut": (_bytes(_photo(), "WEBP")[:-40], "damaged"),
    "png with a flipped byte": (bytes(b ^ (i == 900) for i, b in enumerate(_bytes(_photo(), "PNG"))), "damaged"),
    "png of 60000 x 60000": (png_header(60000, 60000), "too_large"),
    "png of 2^31": (png_header(2**31 - 1, 2**31 - 1), "too_large"),
    "png of no width": (png_header(0, 100), "damaged"),
    "tiff of 100000 x 100000": (_tiff_bomb(), "too_large"),
    "float tiff": (_bytes(Image.new("F", (9, 9), 0.5), "TIFF"), "unsupported"),
    "32-bit tiff": (_bytes(Image.new("I", (9, 9), 2**30), "TIFF"), "unsupported"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_rejected_for_its_reason(name):
    data, reason = HOSTILE[name]
    with pytest.raises(Reject) as error:
        decode(data, LIMIT)
    assert error.value.reason == reason
    assert " at 0x" not in error.value.detail  # an address would differ from process to process


def test_two_processes_name_the_same_rejects_in_the_same_bytes(pictures, tmp_path):
    _corpus(pictures)
    trees = []
    for name in ("first", "second"):
        argv = ["folder", str(pictures), str(tmp_path / name), "--size", "16", "--policy", "quarantine"]
        subprocess.run(
            [sys.executable, "-m", "preprocess", *argv, "--max-reject-fraction", "1", "--encode-threads", "1"],
            check=True, capture_output=True,
        )  # fmt: skip
        trees.append(read_tree(tmp_path / name))
    assert trees[0] == trees[1] and {"rejects.jsonl", "manifest.json"} < set(trees[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    photo = _photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpositions that a camera with this flag has stored
    turned = photo.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else photo
    data = _bytes(turned, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(data, LIMIT)), np.asarray(photo))
    assert oriented_size(data, LIMIT) == (36, 48)


def test_16_bit_grey_is_scaled():
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    found = np.asarray(decode(_bytes(Image.fromarray(values), "PNG"), LIMIT))
    expected = np.round(values / 257).astype(int)
    assert np.abs(found.astype(int) - expected[..., None]).max() <= 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode):
    image = _photo(mode)
    image.putalpha(Image.new("L", image.size, 0))
    assert np.asarray(decode(_bytes(image, "PNG"), LIMIT)).min() == 255


def test_palette_transparency_lies_over_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 0, 0])
    assert np.asarray(decode(_bytes(image, "PNG", transparency=1), LIMIT)).min() == 255
    assert tuple(np.asarray(decode(_bytes(image, "PNG"), LIMIT))[0, 0]) == (200, 0, 0)


def test_cmyk_grey_bilevel_and_first_frame():
    photo = _photo()
    for data in (_bytes(photo.convert("CMYK"), "JPEG", quality=100), _bytes(photo.convert("L"), "PNG")):
        assert np.asarray(decode(data, LIMIT)).shape == (36, 48, 3)
    assert set(np.unique(np.asarray(decode(_bytes(photo.convert("1"), "PNG"), LIMIT)))) == {0, 255}
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = _bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert tuple(np.asarray(decode(data, LIMIT))[0, 0]) == (250, 0, 0)


def test_a_colour_profile_is_converted_and_a_broken_one_is_ignored():
    photo = _photo()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = np.asarray(decode(_bytes(photo, "PNG", icc_profile=lab), LIMIT)).astype(int)
    assert np.abs(same - np.asarray(photo)).max() <= 1
    broken = np.asarray(decode(_bytes(photo, "PNG", icc_profile=b"nonsense" * 20), LIMIT))
    assert np.array_equal(broken, np.asarray(photo))
    swapped = _swap_red_and_blue(lab)
    converted = np.asarray(decode(_bytes(photo, "PNG", icc_profile=swapped), LIMIT)).astype(int)
    assert np.abs(converted - np.asarray(photo)[..., ::-1]).max() <= 3


def _swap_red_and_blue(profile: bytes) -> bytes:
    """The sRGB profile with the places of its red and blue primaries exchanged."""
    count = struct.unpack(">I", profile[128:132])[0]
    table = bytearray(profile)
    at = {profile[132 + 12 * n : 136 + 12 * n]: 132 + 12 * n for n in range(count)}
    table[at[b"rXYZ"] : at[b"rXYZ"] + 4], table[at[b"bXYZ"] : at[b"bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    return bytes(table)


def test_a_wrong_suffix_does_not_matter(config, pictures):
    (pictures / "000.png").write_bytes(_bytes(_photo(), "JPEG"))
    assert preprocess(config).num_samples == 11


def test_a_huge_png_is_rejected_in_little_memory():
    program = (
        "import resource, sys; from preprocess.pictures.images import decode, use_own_size_limit; "
        "from preprocess.rejects import Reject; use_own_size_limit()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode(sys.stdin.buffer.read(), 178_000_000)\n"
        "except Reject as reject: print(reject.reason)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], input=png_header(60000, 60000), capture_output=True, check=True
    )
    reason, kilobytes = result.stdout.split()
    assert reason == b"too_large" and int(kilobytes) < 200_000


def _corpus(pictures: Path) -> int:
    for number, (data, _) in enumerate(HOSTILE.values()):
        (pictures / f"bad{number:02d}.png").write_bytes(data)
    return len(HOSTILE)


def test_policy_fail_names_the_image(config, pictures):
    (pictures / "zz.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"zz.png cannot be used \(not_an_image"):
        preprocess(config)
    assert not Path(config.dest, "manifest.json").exists()


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_skipped_images_are_in_the_ledger_and_counts_close(config, pictures, policy):
    num_bad = _corpus(pictures)
    summary = preprocess(config.replace(policy=policy, max_reject_fraction=0.9, crops_per_image=2))
    assert (summary.num_images, summary.num_rejected_images, summary.num_samples) == (11 + num_bad, num_bad, 22)
    assert summary.num_samples + summary.num_rejected == 2 * summary.num_images
    ledger = [json.loads(line) for line in Path(config.dest, "rejects.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in ledger] == [reason for _, reason in HOSTILE.values()]
    kept = sorted(path.read_bytes() for path in Path(config.dest).glob("quarantine/*"))
    assert kept == (sorted(data for data, _ in HOSTILE.values() if data) if policy == "quarantine" else [])


def test_rejects_beyond_the_ceiling_stop_the_run(config, pictures):
    (pictures / "zz.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="1 of 12 images rejected, more than the 0 that --max-rejects 0"):
        preprocess(config.replace(policy="skip", max_rejects=0))
    for name in ("001", "002", "003", "004", "005", "006"):
        (pictures / f"{name}.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="7 of 12 images rejected, more than the 6 that --max-rejects 10"):
        preprocess(config.replace(policy="skip", dest=config.dest + "2", samples_per_shard=12))


def test_a_few_bad_pictures_of_a_small_set_are_skipped_as_the_advice_says(config, pictures):
    for name in ("zz.png", "zy.png"):
        (pictures / name).write_bytes(b"junk")
    with pytest.raises(UserError, match="use --policy skip"):
        preprocess(config)
    summary = preprocess(config.replace(policy="skip"))
    assert (summary.num_samples, summary.rejected) == (11, {"not_an_image": 2})


def test_a_bad_neighbour_does_not_move_a_latent(config, pictures, autoencoder, tmp_path):
    from preprocess.shards.loader import ShardLoader

    options = {"dtype": "float32", "policy": "skip", "max_reject_fraction": 1.0}
    preprocess(config.replace(**options), autoencoder=autoencoder)
    (pictures / "004.png").write_bytes(b"junk")
    preprocess(config.replace(**options, dest=str(tmp_path / "bad")), autoencoder=autoencoder)
    latents = []
    for url in (config.dest, str(tmp_path / "bad")):
        with ShardLoader(url, batch_size=11, num_epochs=1, flip=False) as loader:
            batch = next(iter(loader))
            latents.append({i: latent.numpy().tobytes() for i, latent in zip(batch.ids, batch.latents)})
    assert len(latents[1]) == 10 and latents[1].items() <= latents[0].items()


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG2000", {}), ("JPEG2000", {"no_jp2": True}), ("TGA", {}), ("TGA", {"compression": "tga_rle"})],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_jpeg_2000_and_targa(mode, form, options):
    picture = _photo(mode)
    found = decode(_bytes(picture, form, **options), LIMIT)
    assert np.array_equal(np.asarray(found), np.asarray(picture.convert("RGB")))
    assert oriented_size(_bytes(picture, form, **options), LIMIT) == (36, 48)
    with pytest.raises(Reject, match="too_large"):
        decode(_bytes(picture, form, **options), 100)
    data = _bytes(picture, form, **options)
    for damaged in (data[: len(data) // 2], data[: len(data) // 2] + bytes(len(data) // 2)):
        if form == "JPEG2000" or (options and len(damaged) < len(data)):
            with pytest.raises(Reject, match="damaged"):
                decode(damaged, LIMIT)


def test_16_bit_jpeg_2000_is_refused_by_name():
    grey = Image.fromarray(np.full((90, 90), 40_000, np.uint16))
    with pytest.raises(Reject, match="unsupported: JPEG 2000 of mode I;16"):
        decode(_bytes(grey, "JPEG2000"), LIMIT)


def test_heic_is_read_where_its_package_is_and_named_where_not():
    from importlib.util import find_spec

    if find_spec("pillow_heif") is None:
        with pytest.raises(Reject, match="unsupported: HEIC needs the package pillow-heif"):
            decode(b"\0\0\0\x18ftypheic" + bytes(40), LIMIT)
        return
    import pillow_heif

    pillow_heif.register_heif_opener()
    found = decode(_bytes(_photo(), "HEIF", quality=95), LIMIT)
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(_photo(), dtype=int)).mean() < 6
