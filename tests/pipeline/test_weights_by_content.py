"""Weights are what the file holds, whatever it is called: variants, shards, wrong suffixes, and what is no weights."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from small_models import small_bundle
from torch import Tensor

from orchestration import cli
from pipeline.bundle import load_bundle, save_bundle
from pipeline.errors import UserError
from pipeline.importing.checkpoint import read_checkpoint
from pipeline.importing.diffusers_folder import import_diffusers


def main(argv: list[str]) -> int:
    return cli.main(["import", *argv])


NAME = "diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 334643268\n" % (b"a" * 64)
PAGE = b"\n <!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def vae(folder: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    model.save_pretrained(folder)
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    return import_diffusers(str(folder)).autoencoder.state_dict()


def same(read: dict[str, Tensor], model: AutoencoderKL, half: bool = False) -> bool:
    expected = model.state_dict()
    values = {k: v.half().float() if half else v for k, v in expected.items()}
    return set(read) == set(values) and all(torch.equal(read[k], v) for k, v in values.items())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"])
def test_a_half_precision_variant_alone(tmp_path: Path, name: str) -> None:
    model = vae(tmp_path)
    half = {k: v.half() for k, v in load_file(str(tmp_path / NAME)).items()}
    (tmp_path / NAME).unlink()
    save_file(half, str(tmp_path / name)) if name.endswith("safetensors") else torch.save(half, tmp_path / name)
    assert same(weights(tmp_path), model, half=True)


def test_full_precision_is_taken_where_both_are_there(tmp_path: Path) -> None:
    model = vae(tmp_path)
    half = {k: v.half() for k, v in load_file(str(tmp_path / NAME)).items()}
    save_file(half, str(tmp_path / "diffusion_pytorch_model.fp16.safetensors"))
    assert same(weights(tmp_path), model)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_as_diffusers_writes_them(tmp_path: Path, variant: str | None) -> None:
    model = vae(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB", variant=variant)
    assert len(list((tmp_path / "parts").glob("*-of-*"))) > 2
    assert same(weights(tmp_path / "parts"), model)
    next((tmp_path / "parts").glob("*-of-*")).unlink()
    with pytest.raises(UserError, match=r"no such file: .*-of-"):
        weights(tmp_path / "parts")
    next((tmp_path / "parts").glob("*index*")).unlink()
    with pytest.raises(UserError, match="shards without their index"):
        weights(tmp_path / "parts")


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, str(tmp_path / "secret.safetensors"))
    (tmp_path / "in").mkdir()
    for file in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), ".."):
        (tmp_path / "in" / "x.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(UserError, match="outside its folder"):
            read_checkpoint(str(tmp_path / "in" / "x.index.json"))
    (tmp_path / "in" / "x.index.json").write_text(json.dumps({"weight_map": {"a": "x.index.json"}}))
    with pytest.raises(UserError, match="not a shard"):
        read_checkpoint(str(tmp_path / "in" / "x.index.json"))


@pytest.mark.parametrize("name", ["model.safetensors", "vae.ckpt", "diffusion_pytorch_model.bin"])
def test_the_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    model = vae(tmp_path)
    (tmp_path / NAME).rename(tmp_path / name)
    assert same(weights(tmp_path), model)
    assert same(import_diffusers(str(tmp_path / name)).autoencoder.state_dict(), model)  # the one file


def test_a_pickled_checkpoint_called_safetensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.safetensors")
    assert read_checkpoint(str(tmp_path / "x.safetensors"))["a"].tolist() == [1.0, 1.0]


def test_two_weight_files_are_no_telling(tmp_path: Path) -> None:
    vae(tmp_path)
    (tmp_path / NAME).rename(tmp_path / "a.safetensors")
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(UserError, match="holds 2 weight files"):
        import_diffusers(str(tmp_path))


def test_a_stable_diffusion_folder_gives_its_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vae(tmp_path / "sd" / "vae")
    for part, name in (("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel")):
        (tmp_path / "sd" / part).mkdir()
        (tmp_path / "sd" / part / "config.json").write_text(json.dumps({"_class_name": name}))
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    assert main(["diffusers", str(tmp_path / "sd"), "--out", str(tmp_path / "bundle")]) == 0
    assert "UNet2DConditionModel" in capsys.readouterr().out
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.denoiser is None and same(bundle.autoencoder.state_dict(), model) and "was left out" in bundle.card


def test_one_file_without_a_configuration_is_named_for_what_it_is(tmp_path: Path) -> None:
    vae(tmp_path / "vae")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "vae" / NAME).read_bytes())
    with pytest.raises(UserError, match=r"put the config\.json of its repository beside it"):
        import_diffusers(str(alone))
    save_file({"first_stage_model.encoder.down.0.block.0.conv1.weight": torch.ones(1)}, str(alone))
    with pytest.raises(UserError, match="latentzoom import ldm"):
        import_diffusers(str(alone))
    save_file({"lora_up.weight": torch.ones(1)}, str(alone))
    with pytest.raises(UserError, match="holds no autoencoder"):
        import_diffusers(str(alone))


STRANGE = {
    "empty": (b"", "is empty"),
    "pointer": (POINTER, "is a Git LFS pointer"),
    "page": (PAGE, "is a web page"),
    "gzip": (gzip.compress(b"x"), "is a gzip file"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
    "json": (b'{"error": "not found"}', "is a JSON file, not weights"),
    "noise": (bytes(range(7, 200)), "not a PyTorch zip checkpoint and not a safetensors file"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "bin"])
def test_what_is_no_weights_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    content, words = STRANGE[kind]
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_checkpoint(str(tmp_path / f"x.{suffix}"))
    assert "\n" not in str(caught.value) and f"x.{suffix}" in str(caught.value)


@pytest.mark.parametrize("kind", ["empty", "pointer", "page"])
@pytest.mark.parametrize("file", [NAME, "config.json"])
def test_in_a_folder_they_are_named_too(tmp_path: Path, kind: str, file: str) -> None:
    vae(tmp_path)
    content, words = STRANGE[kind]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=words):
        import_diffusers(str(tmp_path))


@pytest.mark.parametrize("kind", ["empty", "pointer", "page"])
def test_and_in_a_bundle_that_was_cloned_without_its_weights(tmp_path: Path, kind: str) -> None:
    save_bundle(str(tmp_path), small_bundle())
    content, words = STRANGE[kind]
    (tmp_path / "decoder.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_bundle(str(tmp_path))


@pytest.mark.parametrize("kind", ["empty", "pointer", "page"])
def test_and_where_a_configuration_should_be(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = STRANGE[kind]
    (tmp_path / "config.yaml").write_bytes(content)
    torch.save({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    arguments = [
        "ldm",
        str(tmp_path / "x.ckpt"),
        "--model-config",
        str(tmp_path / "config.yaml"),
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_cut_download_is_named(tmp_path: Path) -> None:
    vae(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        import_diffusers(str(tmp_path))


SMALL = Path(__file__).parent.parent / "data" / "released_small"


def imported(verb: str, file: Path, out: Path) -> int:
    """The command's status for one weight file, with the configuration that the verb wants."""
    if verb == "diffusers":
        vae(file.parent)
        return main([verb, str(file), "--out", str(out)])
    return main([verb, str(file), "--model-config", str(SMALL / "config.yaml"), "--out", str(out)])


@pytest.mark.parametrize("kind", ["empty", "pointer", "page", "pickle"])
@pytest.mark.parametrize("verb", ["released", "ldm", "diffusers"])
def test_every_kind_of_import_says_it_in_one_line(
    tmp_path: Path, verb: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = STRANGE.get(kind, (pickle.dumps(Touch(tmp_path / "ran"), protocol=2), "PyTorch before 1.6"))
    for name in ("x.ckpt", "x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert imported(verb, tmp_path / name, tmp_path / "bundle") == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("latentzoom: error: ") and words in line and name in line
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "ran").exists()
    assert kind != "pickle" or (pickle.loads(content) == 0 and (tmp_path / "ran").exists())  # it would have run


class Touch:
    """Makes a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x"])
def test_a_released_model_in_safetensors_by_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((SMALL / "model.safetensors").read_bytes())
    assert imported("released", tmp_path / name, tmp_path / "bundle") == 0
    assert load_bundle(str(tmp_path / "bundle")).decoder is not None
