"""A bundle from the Hugging Face hub, or a folder that is meant for it."""

from __future__ import annotations

import dataclasses

from pipeline.bundle import FILES, Bundle, load_bundle
from pipeline.exporting.front_matter import card_of_bundle
from pipeline.importing.diffusers_files import local_folder, snapshot


def import_hub_folder(source: str, *, revision: str | None = None, name: str | None = None) -> Bundle:
    """source: a local folder, or the id of a repository on the hub, OWNER/NAME (downloaded and cached by
    huggingface_hub). The card loses the head that is for the hub. Raises `UserError` as `load_bundle` does."""
    folder = local_folder(source) or snapshot(source, revision, sorted(FILES))
    bundle = load_bundle(str(folder))
    if name:
        bundle.config = dataclasses.replace(bundle.config, name=name)
    bundle.card = card_of_bundle(bundle.card)
    return bundle
