"""Bundles of the averaged weights: the one that a run ends with, and those that are written while it goes on.

`bundle/` is the newest and `bundle-best/` the one with the best held-out figure. Each is put in place in one go, so
that whoever looks finds a whole one, or none. Writing takes place in the background, on the main worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from pipeline import storage
from pipeline.bundle import UNFINISHED, Bundle, build_autoencoder, save_bundle
from pipeline.card import model_card
from pipeline.config import to_dict
from training.averaged import Weights, part_builders, weights_by_part
from training.background import BackgroundWriting
from training.config import is_joint
from training.context import Context

NEWEST, BEST = "bundle", "bundle-best"


def trained_bundle(context: Context, weights: Weights, steps: int, more: Mapping[str, Any] | None = None) -> Bundle:
    """The incoming parts and, in place of what the stage trains, these weights after `steps`. more: of its meta.

    It is for saving: the trained parts hold the tensors that are given, and were not initialised for use."""
    model, incoming, config = context.model, context.bundle, context.config
    build = part_builders(config)
    found = weights_by_part(context.stage, weights, joint=is_joint(config))
    parts: dict[str, Any] = {name: getattr(incoming, name, None) for name in build}
    if "autoencoder" in found:
        parts = dict.fromkeys(build)  # the others fit another autoencoder
    elif incoming is None:
        parts["autoencoder"] = build_autoencoder(model)  # the kind "identity", which has no weights
    for name, tensors in found.items():
        with torch.device("meta"):  # no random numbers are drawn: training may be drawing some
            parts[name] = build[name](model)
        parts[name].load_state_dict(tensors, strict=True, assign=True)
    stages = dict(incoming.meta.get("stages", {})) if incoming and "autoencoder" not in found else {}
    stages[context.stage] = {
        "steps": steps,
        "data": context.manifest.digest,
        "settings": to_dict(config),
        **({"started_from": started} if (started := context.started_from()) else {}),
    }
    meta = {"weights": "ema", "stages": stages, **(more or {})}
    if incoming and "imported_from" in incoming.meta:  # its parts are at work here, or began this
        meta["imported_from"] = incoming.meta["imported_from"]
    source = f"{context.manifest.num_images} images of a {context.manifest.source.get('kind', 'folder')} source"
    return Bundle(model, **parts, meta=meta, card=model_card(model, meta, data=source))


class RunningBundles:
    """Writes bundles of a run that goes on, behind the training."""

    def __init__(self, context: Context) -> None:
        self.context, self._writing = context, BackgroundWriting()
        if context.world.is_main:
            for name in (NEWEST, BEST):
                storage.remove_unfinished(storage.join(context.run_dir, name))

    def write(self, weights: Weights, step: int, *, newest: bool, best: Mapping[str, Any] | None) -> None:
        """Start writing the averaged weights after `step`: which nobody may change meanwhile. best: figure, value and
        step of the best bundle, where this is one."""
        self.close()
        going_on = {UNFINISHED: {"step": step, "of": self.context.config.steps}}
        made: list[tuple[str, Bundle]] = []
        if best is not None:
            made.append((BEST, trained_bundle(self.context, weights, step, {**going_on, "best": dict(best)})))
        if newest:
            made.append((NEWEST, trained_bundle(self.context, weights, step, going_on)))
        places = [(storage.join(self.context.run_dir, name), bundle) for name, bundle in made]
        self._writing.start(f"bundle-{step}", *((url, partial(save_bundle, url, bundle)) for url, bundle in places))

    def close(self) -> None:
        """Wait for what is being written."""
        self._writing.close()
