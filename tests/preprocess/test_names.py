"""Split lists as people have them: each names the right pictures or is refused with its line."""

from __future__ import annotations

import codecs
import os
import unicodedata

import pytest

from pipeline.errors import UserError
from preprocess.config import PreprocessConfig
from preprocess.plan import assign_splits
from preprocess.run import preprocess
from preprocess.sources import open_source
from tests.preprocess.conftest import make_pictures


@pytest.fixture
def source(tmp_path):
    """photos/a/9.png, photos/b/1.png, photos/top.png."""
    make_pictures(tmp_path / "photos", 3)
    root = tmp_path / "photos"
    for old, new in (("000", "a/9"), ("001", "b/1"), ("002", "top")):
        (root / new).parent.mkdir(exist_ok=True)
        (root / f"{old}.png").rename(root / f"{new}.png")
    return root


def _val(source, content: bytes | str, **changes: object) -> list[str]:
    path = source.parent / "val.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = PreprocessConfig(
        source_url=str(source), dest=str(source.parent / "out"), size=8, val_list=str(path), **changes
    )
    opened = open_source(config)
    return assign_splits(config, opened, sorted(image for image, _ in opened.list_images()))["val"]


@pytest.mark.parametrize("line", ["b/9.png", "./9.png", "photos/9.png", "b\\9.png", "/nowhere/a/9.png", "../a/9.png"])
def test_a_name_with_a_folder_never_falls_back_to_the_bare_name(source, line):
    with pytest.raises(UserError, match=r"val.txt, line 2: .*(is not in|lies outside) the source"):
        _val(source, f"b/1.png\n{line}\n")
    with pytest.raises(UserError, match="line 1"):
        _val(source, str(source / "9.png"))


@pytest.mark.parametrize(
    "line", ["a/9.png", "./a/9.png", "a\\9.png", ".\\a\\9.png", "a//9.png", "b/../a/9.png", "photos/a/9.png",
             "a/9", "9.png", "9", "9.npy", " a/9.png ", "{root}/a/9.png", "file://{root}/a/9.png", "{link}/a/9.png"],
)  # fmt: skip
def test_lists_as_people_have_them(source, line):
    (source.parent / "link").symlink_to(source)
    line = line.format(root=source, link=source.parent / "link")
    for content in (line, line + "\r\n\r\n", codecs.BOM_UTF8 + line.encode(), line.encode("utf-16")):
        assert _val(source, content) == ["a/9.png"]


def test_composed_names_find_decomposed_files_and_val_folder_takes_the_same_forms(source):
    name = unicodedata.normalize("NFD", "café")
    (source / name).mkdir()
    (source / "top.png").rename(source / name / "é.png".replace("é", "e\u0301"))
    assert _val(source, "café/é.png\n") == [f"{name}/e\u0301.png"]
    for folder in ("café", "./café/", "café\\", str(source / "café")):
        config = PreprocessConfig(source_url=str(source), dest="x", size=8, val_folder=folder)
        opened = open_source(config)
        images = sorted(image for image, _ in opened.list_images())
        assert assign_splits(config, opened, images)["val"] == [f"{name}/e\u0301.png"]


def test_a_name_may_hold_a_line_separator_and_lines_that_are_no_text_are_numbered(source):
    (source / "top.png").rename(source / "two\u2028lines.png")
    assert _val(source, "two\u2028lines.png\n") == ["two\u2028lines.png"]
    with pytest.raises(UserError, match="line 2: not a text of ids"):
        _val(source, b"a/9.png\n\xff\xfe\xfa\n")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff\n"])
def test_an_empty_list_is_no_split(source, content):
    with pytest.raises(UserError, match="val.txt leaves no image for the split 'val'"):
        _val(source, content)


def test_a_list_of_all_leaves_nothing_to_train_on(source):
    everything = open_source(PreprocessConfig(source_url=str(source), dest="x")).list_images()
    with pytest.raises(UserError, match="leaves no image for the split 'train'"):
        _val(source, "\n".join(image for image, _ in everything))


def test_the_ffhq_list_keeps_its_first_image_and_refuses_what_is_no_number(tmp_path):
    make_pictures(tmp_path / "ffhq", 3)
    (tmp_path / "ffhq" / "ffhqtrain.txt").write_bytes(codecs.BOM_UTF8 + b"000.png\n001.png\n")
    (tmp_path / "ffhq" / "ffhqvalidation.txt").write_text("002.png\n")
    config = PreprocessConfig(source="ffhq", source_url=str(tmp_path / "ffhq"), dest="x", size=8, split="ldm")
    source = open_source(config)
    assert [image for image, _ in sorted(source.list_images())] == ["000.png", "001.png", "002.png"]
    (tmp_path / "ffhq" / "ffhqvalidation.txt").write_text("002.png\nface.png\n")
    with pytest.raises(UserError, match="ffhqvalidation.txt, line 2: 'face.png' is not a numbered image"):
        open_source(config)


@pytest.mark.parametrize("mark", ["\u202f", "\u00a0", "\u3000", "\u200d", "\u2028"])
def test_names_of_every_script_are_names(config, pictures, mark):
    (pictures / "000.png").rename(pictures / f"Screenshot 1.01.11{mark}AM.png")
    assert preprocess(config).num_samples == 11
    assert preprocess(config).num_shards_kept == 3


@pytest.mark.parametrize("name", ["new\nline.png", "tab\t.png", b"latin-\xe9.png"])
def test_names_that_no_text_can_hold_are_named_or_skipped_with_a_word(config, pictures, name):
    (pictures / "000.png").rename(pictures / os.fsdecode(name))
    with pytest.raises(UserError, match="characters that are no text; rename"):
        preprocess(config)
    summary = preprocess(config.replace(policy="skip"))
    assert (summary.num_samples, summary.left_out) == (10, {"unusable names": 1})
