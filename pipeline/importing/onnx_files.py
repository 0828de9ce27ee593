"""What `pipeline.exporting.onnx_files` wrote → a bundle with encoder and implicit decoder: a graph's weights have the
names of our parameters, and its metadata says of which model it is a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle import Bundle, build_autoencoder, build_decoder, load_strict
from pipeline.config import ModelConfig, from_dict
from pipeline.errors import UserError, first_line
from pipeline.exporting.front_matter import card_of_bundle
from pipeline.file_systems import local_path
from pipeline.migrations import MODEL_MIGRATIONS, migrated

ENCODER, DECODER = "encoder.onnx", ("decoder_features.onnx", "decoder_render.onnx")


def import_onnx(source: str, *, name: str | None = None) -> Bundle:
    """Read a folder of ONNX files. The bundle has no denoiser and no convolutional decoder, which ONNX does not get.
    Raises `UserError` naming the file that is missing, or not one of latentzoom's."""
    folder = local_path(source)
    if folder is None:
        raise UserError(f"{source} is an address; fetch the folder first")
    if not folder.is_dir():
        raise UserError(f"no such folder: {source}")
    described, weights = _read(folder / DECODER[0])
    weights |= _read(folder / DECODER[1])[1]
    raw = dict(described["config"], **({"name": name} if name else {}))
    raw = migrated(raw, int(described["config_version"]), MODEL_MIGRATIONS, source)
    config = from_dict(ModelConfig, raw, where=f"{source}: model")
    is_identity = config.autoencoder.kind == "identity"
    bundle = Bundle(config, build_autoencoder(config, has_decoder=is_identity), build_decoder(config))
    assert bundle.decoder is not None
    load_strict(bundle.decoder, weights, source)
    if not is_identity:
        load_strict(bundle.autoencoder, _read(folder / ENCODER)[1], str(folder / ENCODER))
    for part in (bundle.autoencoder, bundle.decoder):
        part.eval().requires_grad_(False)
    bundle.meta = {**described["meta"], "imported_from": {"format": "onnx", "source": source}}
    card = folder / "README.md"
    bundle.card = card_of_bundle(card.read_text()) if card.is_file() else f"# {config.name}\n"
    return bundle


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what the model is, parameter → values) of one graph."""
    import onnx

    if not file.is_file():
        raise UserError(f"no such file: {file}")
    try:
        graph = onnx.load(str(file))
    except Exception as error:  # protobuf's own kinds
        raise UserError(f"{file} is not an ONNX file: {first_line(error)}") from error
    meta = {prop.key: prop.value for prop in graph.metadata_props}
    if "latentzoom.model" not in meta:
        raise UserError(f"{file} is not of `latentzoom export`: its metadata names no model of latentzoom")
    found = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.graph.initializer}
    equal: dict[str, str] = json.loads(meta.get("latentzoom.equal", "{}"))
    shared = {name: found[other].clone() for name, other in equal.items()}
    parts = ("trunk.", "head.", "encoder.", "quant_conv.")
    return json.loads(meta["latentzoom.model"]), {k: v for k, v in (found | shared).items() if k.startswith(parts)}
