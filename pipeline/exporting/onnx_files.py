"""Encoder and implicit decoder as ONNX, of any batch and size, checked against PyTorch by onnxruntime.

    encoder.onnx            image (B,3,H,W) in [-1, 1] → latent (B,C,h,w), unscaled
    decoder_features.onnx   latent → table (B,h,w,D): D_phi and what the head computes once a cell
    decoder_render.onnx     table, size (2,), rows (R,) and columns (K,), int64 → image (B,3,R,K): the pixels at rows ×
                            columns of a picture of that size, so also a window or a strip of a large one

The decoder is two graphs because one latent is rendered at many sizes, and a large picture strip by strip. Each file
tells in its metadata which model it is a part of.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from pipeline.bundle import Bundle, load_strict
from pipeline.config import to_dict
from pipeline.errors import UserError
from pipeline.exporting.front_matter import Facts, with_front_matter
from pipeline.exporting.latentzoom_parts import Axis, ImplicitDecoder
from pipeline.migrations import CONFIG_VERSION

Inputs = list[tuple[Tensor, ...]]
OPSET = 18
TOLERANCE = 1e-4
"""Largest difference from PyTorch, relative to the largest value, float32."""
ENCODER, FEATURES, RENDER = "encoder.onnx", "decoder_features.onnx", "decoder_render.onnx"
MODEL, EQUAL = "latentzoom.model", "latentzoom.equal"
"""Metadata: the model's configuration; and parameters that share another's tensor, since their values are equal."""
_USE = """
## Use with onnxruntime

```python
import numpy as np, onnxruntime

features = onnxruntime.InferenceSession("decoder_features.onnx")
render = onnxruntime.InferenceSession("decoder_render.onnx")
(table,) = features.run(None, {"latent": latent})  # float32 (B,C,h,w), from encoder.onnx: not scaled
size, rows, columns = np.array([700, 1000]), np.arange(700), np.arange(1000)  # or some rows: a strip
(image,) = render.run(None, {"table": table, "size": size, "rows": rows, "columns": columns})  # (B,3,700,1000)
```

Pixels larger than cells are drawn at a multiple of the size, with one and a half pixels a cell, and reduced.
"""


class _Encoder(nn.Module):
    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.encoder, self.quant_conv = bundle.autoencoder.encoder, bundle.autoencoder.quant_conv
        self.channels = bundle.config.autoencoder.latent_channels

    def forward(self, image: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(image))[:, : self.channels]


class _Features(nn.Module):
    def __init__(self, decoder: ImplicitDecoder) -> None:
        super().__init__()
        self.trunk, self.head = decoder.trunk, decoder.head

    def forward(self, latent: Tensor) -> Tensor:
        return self.head.table(self.trunk(latent))


class _Render(nn.Module):
    def __init__(self, decoder: ImplicitDecoder) -> None:
        super().__init__()
        self.head = decoder.head

    def forward(self, table: Tensor, size: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        along_y = Axis(rows, size[0], table.shape[1], table.dtype)
        along_x = Axis(columns, size[1], table.shape[2], table.dtype)
        return self.head.pixels(table, along_y, along_x).permute(0, 3, 1, 2)


def write_onnx(bundle: Bundle, folder: Path, facts: Facts) -> None:
    """Write the graphs and a card into `folder`. There is no encoder where the latent is the picture itself. Raises
    `UserError` for a bundle without an implicit decoder, `RuntimeError` where a graph computes something else."""
    if bundle.decoder is None:
        raise UserError("this bundle has no implicit decoder yet; train the stage `decoder` first")
    config = bundle.config
    decoder = ImplicitDecoder(latent_channels=config.autoencoder.latent_channels, **dataclasses.asdict(config.decoder))
    load_strict(decoder, dict(bundle.decoder.state_dict()), "the decoder")
    decoder.eval().requires_grad_(False)
    f, channels = config.autoencoder.factor, config.autoencoder.latent_channels
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        if config.autoencoder.kind != "identity":
            axes = {"image": {0: "B", 2: "H", 3: "W"}, "latent": {0: "B", 2: "h", 3: "w"}}
            images: Inputs = [(torch.rand(b, 3, h * f, w * f) * 2 - 1,) for b, h, w in ((1, 4, 6), (2, 7, 3))]
            _write(_Encoder(bundle), folder / ENCODER, images, ["image"], "latent", axes, bundle)
        latents: Inputs = [(torch.randn(b, channels, h, w),) for b, h, w in ((1, 4, 6), (2, 7, 3))]
        axes = {"latent": {0: "B", 2: "h", 3: "w"}, "table": {0: "B", 1: "h", 2: "w"}}
        features = _Features(decoder)
        _write(features, folder / FEATURES, latents, ["latent"], "table", axes, bundle)
        queries: Inputs = [
            (features(latents[0][0]), torch.tensor([11, 17]), torch.arange(11), torch.arange(17)),
            (features(latents[1][0]), torch.tensor([90, 40]), torch.arange(30, 90), torch.arange(40)),
            (features(latents[1][0]), torch.tensor([7, 3]), torch.arange(7), torch.arange(3)),
        ]
        axes = {"table": {0: "B", 1: "h", 2: "w"}, "rows": {0: "R"}, "columns": {0: "K"}}
        axes["image"] = {0: "B", 2: "R", 3: "K"}
        _write(_Render(decoder), folder / RENDER, queries, ["table", "size", "rows", "columns"], "image", axes, bundle)
    card = with_front_matter(bundle.card or f"# {config.name}\n", config, facts, library="onnx")
    (folder / "README.md").write_text(f"{card.rstrip()}\n{_USE}")


def _write(
    module: nn.Module,
    file: Path,
    inputs: Inputs,
    names: list[str],
    result: str,
    axes: dict[str, dict[int, str]],
    bundle: Bundle,
) -> None:
    """One graph, traced with the first inputs and checked with all of them."""
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that are traced, and the exporter's own future
        torch.onnx.export(
            module,
            inputs[0],
            str(file),
            input_names=names,
            output_names=[result],
            dynamic_axes=axes,
            opset_version=OPSET,
            do_constant_folding=False,  # every parameter keeps its name, by which `import onnx` finds it
            dynamo=False,
        )
    graph = onnx.load(str(file))
    meta = {MODEL: json.dumps(described(bundle)), EQUAL: json.dumps(_equal(module, graph))}
    onnx.helper.set_model_props(graph, meta)
    onnx.checker.check_model(graph)
    onnx.save(graph, str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for one in inputs:
        expected = module(*one).numpy()
        (made,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, one)})
        difference = float(np.abs(made - expected).max() / max(1.0, float(np.abs(expected).max())))
        if made.shape != expected.shape or not difference <= TOLERANCE:
            raise RuntimeError(f"{file.name} differs from PyTorch by {difference:.2g} for {tuple(one[0].shape)}")


def described(bundle: Bundle) -> dict[str, Any]:
    """What is needed to build the bundle again around its weights."""
    return {"config_version": CONFIG_VERSION, "config": to_dict(bundle.config), "meta": bundle.meta}


def _equal(module: nn.Module, graph: onnx.ModelProto) -> dict[str, str]:
    """Parameter → the initializer that has its values: the exporter keeps equal tensors once. A graph that does not use
    a parameter has neither."""
    kept = {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}
    found = {}
    for name, parameter in module.state_dict().items():
        value = parameter.numpy()
        same = [n for n, other in kept.items() if other.shape == value.shape and np.array_equal(other, value)]
        if name not in kept and same:
            found[name] = same[0]
    return found
