"""Exports: what others load computes what we compute, and what is read back is what was written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from small_direct import direct_bundle
from small_models import relative_error, small_bundle, small_config

from orchestration import cli
from orchestration.registry.stored_bundle import bundle_digest
from pipeline.bundle import PARTS, Bundle, build_autoencoder, build_decoder, build_denoiser, load_bundle, save_bundle
from pipeline.config import AutoencoderConfig
from pipeline.errors import UserError
from pipeline.exporting.front_matter import Facts
from pipeline.exporting.onnx_files import write_onnx
from pipeline.model import LatentZoom
from training.evaluation.report import Figure, Report

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 14, 3), dtype=np.uint8))
"""In colour: of a picture without, latentzoom keeps the three channels equal."""


def vq_bundle() -> Bundle:
    """Super-resolution with a VQ encoder that has no convolutional decoder, as the released models are."""
    config = dataclasses.replace(
        small_config("sr", "light"),
        condition_resize="nearest",
        autoencoder=AutoencoderConfig(base_width=8, width_mult=(1, 1, 2), num_res_blocks=1, norm_groups=4),
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        autoencoder = build_autoencoder(config, has_decoder=False)
        bundle = Bundle(config, autoencoder, build_decoder(config), build_denoiser(config))
    for part in PARTS:
        getattr(bundle, part).eval().requires_grad_(False)
    return bundle


BUNDLES = {
    "generation": small_bundle,
    "sr": lambda: small_bundle("sr"),
    "released": vq_bundle,
    "direct": direct_bundle,
    "direct-liif": lambda: direct_bundle("liif"),
}
QUICK = ("generation", "direct")


def export(bundle: Bundle, to: str, folder: Path, *options: str) -> Path:
    bundle.card = "# A small model\n\nFor tests.\n"
    save_bundle(str(folder / "bundle"), bundle)
    assert cli.main(["export", str(folder / "bundle"), "--to", to, "--out", str(folder / to), *options]) == 0
    return folder / to


def read_back(kind: str, source: Path, folder: Path) -> Bundle:
    assert cli.main(["import", kind, str(source), "--out", str(folder / "back")]) == 0
    return load_bundle(str(folder / "back"))


def assert_same(one: Bundle, other: Bundle, parts: tuple[str, ...] = PARTS) -> None:
    assert one.config == other.config and one.card == other.card
    for name in parts:
        weights = [getattr(b, name).state_dict() for b in (one, other) if getattr(b, name)]
        assert len(weights) in (0, 2), name
        for key in weights[0] if weights else ():
            assert torch.equal(weights[0][key], weights[1][key]), key


DIFFUSERS = """
import sys, torch, numpy as np
from PIL import Image
from diffusers import DiffusionPipeline
folder, picture, task = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline=folder + "/latentzoom_pipeline.py", trust_remote_code=True, low_cpu_mem_usage=False
)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
if task == "generation":
    made = [pipe(height=30, width=50, num_inference_steps=4, generator=generator).images[0]]
else:
    made = [pipe(image=Image.open(picture), scale=2.3, num_inference_steps=4, generator=generator).images[0]]
made.append(pipe(image=Image.open(picture), height=5, width=50, num_inference_steps=3,
                 generator=torch.Generator().manual_seed(5)).images[0])
assert not any(name.split(".")[0] in ("pipeline", "orchestration", "training") for name in sys.modules)
for number, one in enumerate(made):
    one.save(f"{folder}/{number}.png")
"""


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow, pytest.mark.more]) for k in BUNDLES]
)
def test_diffusers_alone_draws_the_same_picture(tmp_path, kind):
    bundle = BUNDLES[kind]()
    folder = export(bundle, "diffusers", tmp_path)
    assert (folder / "README.md").read_text().count("Use in diffusers") == 1
    assert_same(bundle, read_back("diffusers", folder, tmp_path))
    PICTURE.save(tmp_path / "small.png")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", DIFFUSERS, str(folder), str(tmp_path / "small.png"), bundle.config.task]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = LatentZoom(bundle)
    if bundle.config.task == "generation":
        expected = [model.generate(1, (30, 50), seed=3, num_steps=4)[0]]
    else:
        expected = [model.upscale(PICTURE, 2.3, seed=3, num_steps=4)]
    expected.append(model.upscale(PICTURE, size=(5, 50), seed=5, num_steps=3))
    for number, ours in enumerate(expected):
        with Image.open(folder / f"{number}.png") as theirs:
            difference = np.abs(np.asarray(theirs, dtype=int) - np.asarray(ours, dtype=int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # of 255 levels: sums in another order


def test_diffusers_refuses_what_it_has_no_input_for(tmp_path, capsys):
    config = small_config("sr")
    config = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, condition_noise=0.3))
    bundle = Bundle(config, build_autoencoder(config), build_decoder(config), build_denoiser(config))
    save_bundle(str(tmp_path / "bundle"), bundle)
    line = ["export", str(tmp_path / "bundle"), "--to", "diffusers", "--out", str(tmp_path / "out")]
    assert cli.main(line) == 2 and "condition_noise" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["generation", "released", "direct", "direct-liif"])
def test_onnx_of_any_size_computes_the_same(tmp_path, kind):
    bundle = BUNDLES[kind]()
    folder = export(bundle, "onnx", tmp_path)
    model = LatentZoom(bundle)
    torch.manual_seed(0)
    sessions = {file.stem: onnxruntime.InferenceSession(str(file)) for file in folder.glob("*.onnx")}
    if "encoder" in sessions:
        image = torch.rand(3, 3, 20, 44) * 2 - 1
        latent = torch.from_numpy(sessions["encoder"].run(None, {"image": image.numpy()})[0])
        assert relative_error(latent, model.encode(image)) < 1e-5
    else:
        assert kind.startswith("direct")
        latent = torch.rand(3, 3, 5, 11) * 2 - 1
    (table,) = sessions["decoder_features"].run(None, {"latent": latent.numpy()})
    for size, window in (((37, 90), (0, 0, 37, 90)), ((200, 64), (150, 0, 181, 64))):
        rows, columns = np.arange(window[0], window[2]), np.arange(window[1], window[3])
        asked = {"table": table, "size": np.array(size), "rows": rows, "columns": columns}
        (drawn,) = sessions["decoder_render"].run(None, asked)
        assert relative_error(torch.from_numpy(drawn), model.decode(latent, size, window)) < 1e-5
    assert (folder / "README.md").read_text().count("Use with onnxruntime") == 1
    back = read_back("onnx", folder, tmp_path)
    assert_same(bundle, back, ("decoder",))
    assert back.denoiser is None and back.autoencoder.identity() == bundle.autoencoder.identity()


def test_onnx_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.exporting.onnx_files.TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="differs from PyTorch"):
        write_onnx(direct_bundle(), tmp_path, Facts())


def test_strangers_onnx_is_named(tmp_path, capsys):
    assert cli.main(["import", "onnx", str(tmp_path / "none"), "--out", str(tmp_path / "b")]) == 2
    assert cli.main(["import", "onnx", "s3://bucket/model", "--out", str(tmp_path / "b")]) == 2
    (tmp_path / "decoder_features.onnx").write_bytes(b"<html>")
    assert cli.main(["import", "onnx", str(tmp_path), "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "no such folder" in said[0] and "decoder_features.onnx is not" in said[2]
    assert "is an address" in said[1]


def test_the_hub_reads_licence_tags_and_figures(tmp_path):
    bundle = small_bundle("sr")
    bundle.card = "# A small model\n\nFor tests.\n"
    save_bundle(str(tmp_path / "bundle"), bundle)
    figure = Figure(
        name="psnr_y", method="ours", setting="x4", value=27.5, low=27.0, high=28.0, protocol="benchmark", num=9
    )
    report = Report(
        task="sr", model="m", model_name="small", bundle_digest=bundle_digest(tmp_path / "bundle"),
        encoder_identity="", data="s3://bucket/My Photos", data_digest="d", split="", num=9, seed=0, sampler="",
        figures=(figure, dataclasses.replace(figure, method="bicubic", value=26.0)),
    )  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report.to_json()))
    folder = export(bundle, "hub-folder", tmp_path, "--licence", "CC-BY-4.0", "--report", str(tmp_path / "report.json"))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0", "latentzoom", "image-to-image",
    )  # fmt: skip
    assert {"super-resolution", "latent-diffusion"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_config) == ("psnr_y", 27.5, "x4")
    head = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert head["model-index"][0]["name"] == "small" and head["model-index"][0]["results"][0]["dataset"]["type"]
    LatentZoom.load(folder)  # as it is
    back = read_back("hub-folder", folder, tmp_path)
    assert_same(bundle, back)
    assert bundle_digest(tmp_path / "back") == bundle_digest(tmp_path / "bundle")
    other = [*["export", "starter:sharp", "--to", "hub-folder", "--out"], str(tmp_path / "starter")]
    assert cli.main(other) == 0
    card = ModelCard.load(tmp_path / "starter/README.md")
    assert card.data.license == "cc-by-sa-4.0" and {r.metric_type for r in card.data.eval_results} == {
        "psnr_y",
        "lpips",
    }
    wrong = ["export", "starter:sharp", "--to", "hub-folder", "--out", str(tmp_path / "x"), "--report"]
    assert cli.main([*wrong, str(tmp_path / "report.json")]) == 2


@pytest.mark.parametrize("first", ["diffusers", "onnx"])
def test_what_is_exported_again_says_once_how_it_is_used(tmp_path, first):
    folder = export(direct_bundle(), first, tmp_path)
    back = tmp_path / "back"
    assert cli.main(["import", first, folder.as_uri(), "--out", str(back)]) == 0  # an address of this machine
    (back / "README.md").write_text(f"{(back / 'README.md').read_text()}\n## Licence\n\nOurs.\n")
    again = ["export", str(back), "--to", "diffusers", "--out", str(tmp_path / "again")]
    assert cli.main(again) == 0
    card = (tmp_path / "again/README.md").read_text()
    assert card.count("## Use") == 1 and "## Licence" in card and "For tests." in card
    (back / "README.md").write_text((folder / "README.md").read_text() + "\n## Licence\n\nOurs.\n")  # as it was read
    assert cli.main([*again, "--overwrite"]) == 0
    card = (tmp_path / "again/README.md").read_text()
    assert card.count("## Use") == 1 and "## Licence" in card and "For tests." in card


@pytest.mark.parametrize("licence", ["Apache 2.0: no", "MIT\ntags: x", "mit/x"])
def test_a_licence_is_an_identifier(tmp_path, capsys, licence):
    line = ["export", "starter:sharp", "--to", "hub-folder", "--out", str(tmp_path / "out"), "--licence", licence]
    assert cli.main(line) == 2 and "such as Apache-2.0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_place_that_holds_something_is_left(tmp_path, capsys):
    folder = export(direct_bundle(), "hub-folder", tmp_path)
    line = ["export", str(tmp_path / "bundle"), "--to", "diffusers", "--out"]
    assert cli.main([*line, str(folder)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*line, str(tmp_path / "bundle"), "--overwrite"]) == 2 and "no export" in capsys.readouterr().err
    assert cli.main([*line, str(folder), "--overwrite"]) == 0
    assert not (folder / "config.json").exists() and (folder / "model_index.json").exists()
    with pytest.raises(UserError, match="no bundle"):
        load_bundle(str(folder))
