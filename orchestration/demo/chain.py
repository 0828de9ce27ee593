"""The whole system in two acts, small: every step calls what its own verb calls.

1. photographs → enlarged by the starter that ships
2. one picture → shards → autoencoder → shards with latents → decoder → denoiser → align → evaluate → register →
   promote → load the champion back → draw new fields
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from orchestration import registry, tracking
from orchestration.chain.steps import Result, Step
from orchestration.demo import enlargements, fields, photos
from orchestration.demo.contact_sheet import contact_sheet
from orchestration.evaluation.evaluate import evaluate
from orchestration.evaluation.networks import with_found_lpips
from orchestration.evaluation.spec import EvaluationSpec
from orchestration.output import save_atomically
from orchestration.ray_train import launch
from orchestration.stage_run import stage_run
from pipeline.config import to_dict
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.starter import starter_path
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.config import Preset, preset_to_dict
from training.identity import deciding
from training.presets import demo as demo_preset

NUM_WORKERS = 2
FREE_BYTES = 1 << 30
CROPS = 256
"""Square crops of each orientation of the field, and of the held-out strip, seeded."""
CROP_PIXELS = 128
"""Side of a crop of the field; the model's own pictures are half as large."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Folders and settings of one demo. Everything lies under `work`."""

    work: Path
    preset: Preset

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.work / 'mlflow.db'}"

    @property
    def enlarged(self) -> Path:
        """The picture of the first act."""
        return self.work / "enlarged.png"

    def path(self, *parts: str) -> str:
        return str(self.work.joinpath(*parts))


def open_demo(work: Path, minutes: float) -> Demo:
    """Check the folder (writable, enough space). Raises `UserError` otherwise."""
    if minutes < 5:
        raise UserError(f"--minutes {minutes:g} is too few; use at least 5")
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(work)):
        raise UserError("--workdir of the demo is a folder of this machine; leave the address out")
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe = work / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {work}: {error.strerror}; choose another folder with --workdir") from error
    free = shutil.disk_usage(work).free
    if free < FREE_BYTES:
        raise UserError(f"{work} has {free >> 20} MB free and the demo needs {FREE_BYTES >> 20} MB; free some")
    return Demo(work=work.resolve(), preset=demo_preset(minutes))


def act_one(demo: Demo) -> list[Step]:
    """Photographs enlarged by the starter: seconds. Other weights of the starter, or other LPIPS weights, redo it."""
    lpips = with_found_lpips(EvaluationSpec(task="sr", scales=enlargements.SCALES)).lpips
    places = [photo.place for photo in photos.HELD_OUT]
    settings = [places, photos.DETAILS, enlargements.SCALES, registry.bundle_digest(starter_path()), lpips]
    return [Step(name="enlarge", settings=settings, run=lambda done: _enlarge(demo))]


def act_two(demo: Demo) -> list[Step]:
    """The chain from a picture to the sheet. Keys hold the settings, so another --minutes trains anew and reuses the
    shards."""
    preset = preset_to_dict(demo.preset)
    stage = {name: [deciding(preset[name]), preset["model"]] for name in demo.preset.stages}
    crops = [CROPS, CROP_PIXELS, demo.preset.model.image_size]
    (enlarged,) = act_one(demo)
    return [
        Step(name="field", settings=[photos.FIELD, photos.FIELD_COLUMNS, photos.TURNS], run=lambda done: _field(demo)),
        Step(name="images", settings=crops, after=("field",), run=lambda done: _shards(demo, "images", None)),
        Step(
            name="autoencoder",
            settings=stage["autoencoder"],
            after=("images",),
            run=lambda done: _train(demo, "autoencoder", "images", None),
        ),
        Step(
            name="latents",
            settings=crops,
            after=("autoencoder",),
            run=lambda done: _shards(demo, "latents", done["autoencoder"]["bundle"]),
        ),
        Step(
            name="decoder",
            settings=stage["decoder"],
            after=("latents",),
            run=lambda done: _train(demo, "decoder", "latents", done["autoencoder"]["bundle"]),
        ),
        Step(
            name="denoiser",
            settings=stage["denoiser"],
            after=("decoder",),
            run=lambda done: _train(demo, "denoiser", "latents", done["decoder"]["bundle"]),
        ),
        Step(
            name="align",
            settings=stage["align"],
            after=("denoiser",),
            run=lambda done: _train(demo, "align", "latents", done["denoiser"]["bundle"]),
        ),
        Step(name="evaluate", settings=1, after=("align",), run=lambda done: _evaluate(demo, done["align"]["bundle"])),
        Step(name="register", settings=0, after=("evaluate",), run=lambda done: _register(demo, done)),
        Step(name="promote", settings=0, after=("register",), run=lambda done: _promote(demo, done)),
        Step(name="use", settings=[2, enlarged.settings], after=("promote",), run=lambda done: _use(demo, done)),
    ]


def _enlarge(demo: Demo) -> Result:
    held_out = photos.lay_out_photographs(demo.work / "photos")
    model, networks = LatentZoom.starter(), enlargements.lpips_networks()
    made = [enlargements.enlarge(model, networks, path, scale) for path in held_out for scale in enlargements.SCALES]
    save_atomically(enlargements.panel(made, networks.lpips_name), demo.enlarged, "PNG", {})
    figures = [e.figures for e in made]
    return {
        "figures": [dataclasses.asdict(f) for f in figures],
        "lpips_name": networks.lpips_name,
        "metric": enlargements.verdict(figures, networks.lpips_name),
        "outputs": [str(demo.enlarged)],
    }


def _field(demo: Demo) -> Result:
    train, held_out = photos.lay_out_field(demo.work / "field")
    return {"metric": f"Hubble deep field: {train} columns to train on, {held_out} held out"}


def _shards(demo: Demo, name: str, bundle: str | None) -> Result:
    config = PreprocessConfig(
        source="folder",
        source_url=demo.path("field"),
        dest=demo.path("shards", name),
        autoencoder=bundle,
        size=demo.preset.model.image_size,
        crop="random",
        crops_per_image=CROPS,
        crop_pixels=CROP_PIXELS,
        val_folder="val",
        samples_per_shard=192,
        batch_size=16,
        encode_threads=1,
    )
    _clear_other_shards(config)
    summary = preprocess(config)
    return {
        "metric": f"{summary.num_samples} samples in {summary.num_shards} shards",
        "digest": summary.manifest_digest,
        "scale_factor": summary.scale_factor,
    }


def _clear_other_shards(config: PreprocessConfig) -> None:
    """Shards of another autoencoder or other crops are of no use in the demo's own folder: they are begun anew."""
    encoder = registry.bundle_digest(config.autoencoder) if config.autoencoder else None
    mark = json.dumps([config.transform(), config.samples_per_shard, config.val_folder, encoder], sort_keys=True)
    file = Path(config.dest).with_suffix(".json")
    if not file.exists() or file.read_text() != mark:
        shutil.rmtree(config.dest, ignore_errors=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(mark)


def _train(demo: Demo, stage: str, data: str, bundle: str | None) -> Result:
    run_dir = demo.path("runs", stage)
    _clear_other_run(Path(run_dir), demo.preset, stage, bundle)
    places: dict[str, Any] = {"data": demo.path("shards", data), "run_dir": run_dir}
    with stage_run(demo.tracking_uri, stage, demo.preset, parent=_parent_run(demo), **places) as spec:
        result = launch(stage, demo.preset, bundle=bundle, num_workers=NUM_WORKERS, reporter_spec=spec, **places)
    key = "psnr" if stage in ("autoencoder", "decoder") else "loss"
    value = result.metrics.get(key, float("nan"))
    return {
        "bundle": result.bundle,
        "first_loss": result.first_loss,
        "last_loss": result.last_loss,
        "num_steps": result.steps,
        "metric": f"{result.steps} steps" + (f", {value:.2f} dB on its last batches" if key == "psnr" else ""),
        "run_id": spec["run_id"],
    }


def _clear_other_run(run_dir: Path, preset: Preset, stage: str, bundle: str | None) -> None:
    """A run folder of other settings or another bundle is begun anew; one of these is continued."""
    digest = registry.bundle_digest(bundle) if bundle else None
    mark = json.dumps([deciding(to_dict(preset.stage(stage))), to_dict(preset.model), digest], sort_keys=True)
    file = run_dir / "demo.json"
    if run_dir.exists() and (not file.exists() or file.read_text() != mark):
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(mark)


def _parent_run(demo: Demo) -> str:
    uri = demo.tracking_uri
    return tracking.find_run(uri, "demo") or tracking.start_run(uri, "demo", params=preset_to_dict(demo.preset))


def _evaluate(demo: Demo, bundle: str) -> Result:
    size = demo.preset.model.image_size
    figures: dict[str, Any] = {}
    for task, num in (("reconstruction", 96), ("generation", 32)):
        spec = EvaluationSpec(
            task=task,  # type: ignore[arg-type]
            sizes=(size,) if task == "reconstruction" else (size, 2 * size),
            num=num,
            split="val",
            num_steps=20,
        )
        report, _ = evaluate(bundle, demo.path("shards", "latents"), spec, work_dir=demo.path("evaluation"))
        figures[task] = report.to_json()
    name, larger = f"{size}x{size}", f"{2 * size}x{2 * size}"
    psnr = {f["method"]: f["value"] for f in figures["reconstruction"]["figures"] if f["name"] == "psnr_rgb"}
    (agreement,) = (f["value"] for f in figures["generation"]["figures"] if f["name"] == "selfssim")
    return {
        "reports": figures,
        "psnr": psnr,
        "metric": f"held-out strip: {psnr['ours']:.2f} dB, nearest {psnr['nearest']:.2f}, bicubic "
        f"{psnr['bicubic']:.2f}; new fields at {name} and {larger} agree: SSIM {agreement:.3f}",
    }


def _register(demo: Demo, done: dict[str, Result]) -> Result:
    uri, parent = demo.tracking_uri, _parent_run(demo)
    report = done["evaluate"]["reports"]["reconstruction"]
    tracking.log_metrics(uri, parent, {f"psnr_{k}": v for k, v in done["evaluate"]["psnr"].items()}, step=0)
    version = registry.register(
        done["align"]["bundle"],
        photos.MODEL_NAME,
        tracking_uri=uri,
        run_id=parent,
        report=report,
        dataset=(demo.path("shards", "latents"), done["latents"]["digest"]),
    )
    return {"version": version.version, "metric": f"{version.uri}, alias candidate"}


def _promote(demo: Demo, done: dict[str, Result]) -> Result:
    decision = registry.promote(photos.MODEL_NAME, tracking_uri=demo.tracking_uri)
    champion = registry.get_version(photos.MODEL_NAME, registry.CHAMPION, tracking_uri=demo.tracking_uri)
    assert champion is not None
    tracking.end_run(demo.tracking_uri, _parent_run(demo))
    return {"champion": champion.version, "metric": f"champion is version {champion.version} ({decision.summary()})"}


def _use(demo: Demo, done: dict[str, Result]) -> Result:
    model = registry.load(f"models:/{photos.MODEL_NAME}@champion", tracking_uri=demo.tracking_uri)
    minutes = sum(done[name]["seconds"] for name in demo.preset.stages) / 60
    trained = f"{minutes:.1f} minutes of training on {os.cpu_count()} CPU cores"
    with Image.open(demo.enlarged) as enlarged:
        sheet = contact_sheet(enlarged.convert("RGB"), fields.panel(model, trained))
    target = demo.work / "contact-sheet.png"
    save_atomically(sheet, target, "PNG", {})
    return {"metric": f"{sheet.width}x{sheet.height} pixels", "sheet": str(target), "outputs": [str(target)]}
