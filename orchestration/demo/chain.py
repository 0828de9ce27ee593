"""The demo's two acts: photographs enlarged at once, then the chain of `latentzoom pipeline` on one picture.

1. photographs → enlarged by the starter that ships; one picture → a folder of pictures
2. the chain of `latentzoom pipeline` with the preset `demo`, from that folder to the champion → new fields measured at
   two sizes → the champion loaded back, which draws the sheet
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

from PIL import Image

from orchestration.chain.job import Chain, Job
from orchestration.chain.steps import Result, Step
from orchestration.demo import enlargements, fields, photos
from orchestration.demo.contact_sheet import contact_sheet
from orchestration.evaluation.evaluate import evaluate
from orchestration.pictures.output import save_atomically
from orchestration.registry import versions as registry
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.starter import starter_path
from preprocess.config import PreprocessConfig
from training.config import Preset
from training.evaluation.networks import with_found_lpips
from training.evaluation.report import load_report
from training.evaluation.spec import EvaluationSpec
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
    """Photographs enlarged by the starter, and the field laid out: seconds. Other weights of the starter, or other
    LPIPS weights, redo the first."""
    lpips = with_found_lpips(EvaluationSpec(task="sr", scales=enlargements.SCALES)).lpips
    places = [photo.place for photo in photos.HELD_OUT]
    settings = [places, photos.DETAILS, enlargements.SCALES, registry.bundle_digest(starter_path()), lpips]
    field = [photos.FIELD, photos.FIELD_COLUMNS, photos.TURNS]
    return [
        Step(name="enlarge", settings=settings, run=lambda done: _enlarge(demo)),
        Step(name="field", settings=field, run=lambda done: _field(demo)),
    ]


def act_two(demo: Demo) -> tuple[Chain, list[Step]]:
    """The chain over what `act_one` laid out, and all steps of the act: the chain's, then the demo's own."""
    size = demo.preset.model.image_size
    job = Job(
        work=str(demo.work),
        model_name=photos.MODEL_NAME,
        preset=demo.preset,
        preprocess=PreprocessConfig(
            source="folder",
            source_url=demo.path("field"),
            dest="",
            size=size,
            crop="random",
            crops_per_image=CROPS,
            crop_pixels=CROP_PIXELS,
            val_folder="val",
            samples_per_shard=192,
            batch_size=16,
            encode_threads=1,
        ),
        evaluation=EvaluationSpec(task="reconstruction", sizes=(size,), num=96),
        tracking_uri=demo.tracking_uri,
        workers=NUM_WORKERS,
        gpus_per_worker=0.0,  # the preset is one for CPU cores, and two workers of a machine with one GPU would wait
    )
    chain, enlarged = Chain(job), act_one(demo)[0]
    fields_step = Step(name="fields", settings=size, after=("align",), run=lambda done: _fields(demo, chain, done))
    use = Step(
        name="use", settings=[2, enlarged.settings], after=("promote", "fields"), run=lambda done: _use(demo, done)
    )
    return chain, [*chain.steps, fields_step, use]


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
    return {
        "metric": f"Hubble deep field: {train} columns to train on, {held_out} held out",
        "outputs": [str(path) for path in sorted((demo.work / "field").glob("*/*.png"))],
    }


def _fields(demo: Demo, chain: Chain, done: dict[str, Result]) -> Result:
    """How far new fields agree between the model's own size and twice that."""
    size = demo.preset.model.image_size
    spec = EvaluationSpec(task="generation", sizes=(size, 2 * size), num=32, num_steps=20)
    data, work = chain.folder("latents"), demo.path("fields", chain.keys["align"][:16])
    report, _ = evaluate(done["align"]["bundle"], data, spec, work_dir=work)
    (agreement,) = (figure.value for figure in report.figures if figure.name == "selfssim")
    return {"metric": f"new fields at {size}x{size} and {2 * size}x{2 * size} agree: SSIM {agreement:.3f}"}


def held_out_psnr(results: dict[str, Result]) -> dict[str, float]:
    """Mean PSNR (dB) of the held-out strip by method: ours, nearest, bicubic."""
    report = load_report(results["evaluate"]["report"])
    return {figure.method: figure.value for figure in report.figures if figure.name == "psnr_rgb"}


def _use(demo: Demo, done: dict[str, Result]) -> Result:
    model = registry.load(f"models:/{photos.MODEL_NAME}@champion", tracking_uri=demo.tracking_uri)
    minutes = sum(done[name]["seconds"] for name in demo.preset.stages) / 60
    trained = f"{minutes:.1f} minutes of training on {os.cpu_count()} CPU cores"
    with Image.open(demo.enlarged) as enlarged:
        sheet = contact_sheet(enlarged.convert("RGB"), fields.panel(model, trained))
    target = demo.work / "contact-sheet.png"
    save_atomically(sheet, target, "PNG", {})
    return {"metric": f"{sheet.width}x{sheet.height} pixels", "sheet": str(target), "outputs": [str(target)]}
