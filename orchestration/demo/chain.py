"""The whole system on real photographs, small: every step calls what its own verb calls.

photographs → shards → autoencoder → shards with latents → decoder → denoiser → align → evaluate → register →
promote → load the champion back → generate and upscale
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from orchestration import registry, tracking
from orchestration.chain.steps import Result, Step
from orchestration.demo import photos
from orchestration.demo.contact_sheet import draw
from orchestration.evaluation.evaluate import evaluate
from orchestration.evaluation.spec import EvaluationSpec
from orchestration.output import save_atomically
from orchestration.ray_train import launch
from orchestration.stage_run import stage_run
from pipeline.config import to_dict
from pipeline.errors import UserError
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.config import Preset, preset_to_dict
from training.presets import demo as demo_preset

NUM_WORKERS = 2
FREE_BYTES = 1 << 30
CROPS = 64
"""Square crops of each photograph, seeded."""
CROP_FRACTION = (0.25, 1.0)
"""Smallest and largest side of a crop, in short sides of the photograph."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Folders and settings of one demo. Everything lies under `work`."""

    work: Path
    preset: Preset

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.work / 'mlflow.db'}"

    def path(self, *parts: str) -> str:
        return str(self.work.joinpath(*parts))


def open_demo(work: Path, minutes: float) -> Demo:
    """Check the folder (writable, enough space). Raises `UserError` otherwise."""
    if minutes < 5:
        raise UserError(f"--minutes {minutes:g} is too few; use at least 5")
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe = work / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {work}: {error.strerror}; choose another folder with --work") from error
    free = shutil.disk_usage(work).free
    if free < FREE_BYTES:
        raise UserError(f"{work} has {free >> 20} MB free and the demo needs {FREE_BYTES >> 20} MB; free some")
    return Demo(work=work.resolve(), preset=demo_preset(minutes))


def steps(demo: Demo) -> list[Step]:
    """The demo as a chain. Keys hold the settings, so another --minutes trains anew and reuses the shards."""
    preset = preset_to_dict(demo.preset)
    stage = {name: [preset[name], preset["model"]] for name in ("autoencoder", "decoder", "denoiser", "align")}
    crops = [CROPS, CROP_FRACTION, demo.preset.model.image_size]
    return [
        Step(
            name="photographs",
            settings=[photos.TRAIN, photos.HELD_OUT],
            run=lambda done: _photographs(demo),
        ),
        Step(name="images", settings=crops, after=("photographs",), run=lambda done: _shards(demo, "images", None)),
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
        Step(name="evaluate", settings=0, after=("align",), run=lambda done: _evaluate(demo, done["align"]["bundle"])),
        Step(name="register", settings=0, after=("evaluate",), run=lambda done: _register(demo, done)),
        Step(name="promote", settings=0, after=("register",), run=lambda done: _promote(demo, done)),
        Step(name="use", settings=1, after=("promote",), run=lambda done: _use(demo)),
    ]


def _photographs(demo: Demo) -> Result:
    num_train, num_held_out = photos.lay_out(demo.work / "photos")
    return {"metric": f"{num_train} to train on, {num_held_out} held out"}


def _shards(demo: Demo, name: str, bundle: str | None) -> Result:
    config = PreprocessConfig(
        source="folder",
        source_url=demo.path("photos"),
        dest=demo.path(name),
        autoencoder=bundle,
        size=demo.preset.model.image_size,
        crop="random",
        crops_per_image=CROPS,
        crop_fraction=CROP_FRACTION,
        val_folder="val",
        samples_per_shard=192,
        batch_size=16,
        encode_threads=1,
    )
    _clear_other_plan(config)
    summary = preprocess(config)
    return {
        "metric": f"{summary.num_samples} samples in {summary.num_shards} shards",
        "digest": summary.manifest_digest,
        "scale_factor": summary.scale_factor,
    }


def _clear_other_plan(config: PreprocessConfig) -> None:
    """Shards of another autoencoder are of no use in the demo's own folder: begin them anew."""
    from preprocess.run import load_encoder

    manifest = Path(config.dest) / "plan.json"
    if not manifest.exists():
        return
    encoder = load_encoder(config.autoencoder)
    if encoder is not None and encoder.identity() not in manifest.read_text():
        shutil.rmtree(config.dest)


def _train(demo: Demo, stage: str, data: str, bundle: str | None) -> Result:
    run_dir = demo.path("runs", stage)
    _clear_other_run(Path(run_dir), demo.preset, stage, bundle)
    places: dict[str, Any] = {"data": demo.path(data), "run_dir": run_dir}
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
    mark = json.dumps([to_dict(preset.stage(stage)), to_dict(preset.model), digest], sort_keys=True)
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
        report, _ = evaluate(bundle, demo.path("latents"), spec, work_dir=demo.path("evaluation"))
        figures[task] = report.to_json()
    reconstruction = figures["reconstruction"]
    name = f"{size}x{size}"
    psnr = {f["method"]: f["value"] for f in reconstruction["figures"] if f["name"] == "psnr_rgb"}
    return {
        "reports": figures,
        "psnr": psnr,
        "metric": "held-out PSNR at "
        + f"{name}: ours {psnr['ours']:.2f}, nearest {psnr['nearest']:.2f}, bicubic {psnr['bicubic']:.2f} dB",
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
        dataset=(demo.path("latents"), done["latents"]["digest"]),
    )
    return {"version": version.version, "metric": f"{version.uri}, alias candidate"}


def _promote(demo: Demo, done: dict[str, Result]) -> Result:
    decision = registry.promote(photos.MODEL_NAME, tracking_uri=demo.tracking_uri)
    champion = registry.get_version(photos.MODEL_NAME, registry.CHAMPION, tracking_uri=demo.tracking_uri)
    assert champion is not None
    tracking.end_run(demo.tracking_uri, _parent_run(demo))
    return {"champion": champion.version, "metric": f"champion is version {champion.version} ({decision.summary()})"}


def _use(demo: Demo) -> Result:
    model = registry.load(f"models:/{photos.MODEL_NAME}@champion", tracking_uri=demo.tracking_uri)
    held_out = [demo.work / "photos" / "val" / Path(name).name for name in photos.HELD_OUT]
    title = f"latentzoom demo: a tiny model, {os.cpu_count()} CPU cores, {len(photos.TRAIN)} training photographs"
    sheet = draw(model, held_out, title)
    target = demo.work / "contact-sheet.png"
    save_atomically(sheet, target, "PNG", {})
    return {"metric": f"{sheet.width}x{sheet.height} pixels", "sheet": str(target)}
