"""The MLflow run of one training stage: begun once, found again when the stage continues, closed as it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from orchestration import tracking
from orchestration.folder_figures import send_folder
from pipeline import storage
from pipeline.errors import Stopped, UserError
from pipeline.redact import url_without_secrets
from preprocess.manifest import load_manifest
from training.config import Preset

Spec = dict[str, Any]
"""Arguments of `MlflowReporter` that a worker needs: run_id and tracking_uri."""

PLACE = "latentzoom.run_dir"
_WORDS: dict[str, str] = {
    "autoencoder": "Stage 0: the autoencoder whose latents everything else works on.",
    "decoder": "Alignment stage 1: the implicit neural decoder renders the autoencoder's latents at any size.",
    "denoiser": "The latent diffusion model, before alignment.",
    "align": "Alignment stage 2: the denoiser, through the frozen implicit decoder.",
    "distill": "One-step super-resolution: a student learns the aligned denoiser's trajectories.",
}


@contextlib.contextmanager
def stage_run(
    uri: str, stage: str, preset: Preset, *, data: str, run_dir: str, parent: str | None = None
) -> Iterator[Spec]:
    """A RUNNING run around the block, with parameters, description and data set; afterwards FINISHED, KILLED (it was
    asked to stop) or FAILED.

    A child of `parent` is found again by its stage, a run without a parent by `run_dir`. A run that begins late takes
    over what `run_dir` holds already. Raises `UserError` when the tracking store cannot be used, or `data` is no shard
    set.
    """
    spec = {"run_id": _open(uri, stage, preset, data, run_dir, parent), "tracking_uri": uri}
    try:
        yield spec
    except BaseException as error:
        was_stopped = isinstance(error, (KeyboardInterrupt, Stopped))
        with contextlib.suppress(UserError):  # the first error is the one to show
            tracking.end_run(uri, spec["run_id"], "KILLED" if was_stopped else "FAILED")
        raise
    with contextlib.suppress(UserError):  # a store that went away does not undo a finished stage
        tracking.end_run(uri, spec["run_id"])


def _open(uri: str, stage: str, preset: Preset, data: str, run_dir: str, parent: str | None) -> str:
    place = url_without_secrets(storage.absolute(run_dir))
    tag = None if parent else (PLACE, place)
    found = tracking.find_run(uri, stage, parent=parent, tag=tag)
    if found:
        tracking.reopen_run(uri, found)
        return found
    manifest = load_manifest(data)
    tags = {"mlflow.note.content": f"{_WORDS[stage]}\n\nPreset `{preset.name}`, in `{place}`.", PLACE: place}
    run_id = tracking.start_run(uri, stage, parent=parent, tags=tags, params={"preset": preset.name})
    tracking.log_dataset(uri, run_id, url_without_secrets(storage.absolute(data)), manifest.digest)
    send_folder(uri, run_id, run_dir)
    return run_id
