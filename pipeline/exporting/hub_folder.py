"""A bundle whose card has a head for the Hugging Face hub: `huggingface_hub` uploads the folder as it is, and
`LatentZoom.load` reads it as it is."""

from __future__ import annotations

from pathlib import Path

from pipeline.bundle import Bundle, save_bundle
from pipeline.exporting.front_matter import Facts, with_front_matter


def write_hub_folder(bundle: Bundle, folder: Path, facts: Facts) -> None:
    """Write the bundle's files and its card into a new folder."""
    save_bundle(str(folder), bundle)
    card = folder / "README.md"
    card.write_text(with_front_matter(card.read_text(), bundle.config, facts))
