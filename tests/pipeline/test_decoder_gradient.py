"""Gradients through the frozen decoder: what alignment stage 2 relies on."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import small_bundle
from torch import Tensor

from pipeline.decoder import ImplicitDecoder
from pipeline.diffusion import Schedule

KINDS = ["liif", "light"]


def decoder_of(kind: str) -> ImplicitDecoder:
    decoder = small_bundle(decoder=kind).decoder
    assert decoder is not None
    return decoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_latent_gradient_matches_finite_differences(kind: str, chunk: int) -> None:
    """In float64, through D_phi and the head, with several checkpointed chunks and with one."""
    decoder = decoder_of(kind).double()
    latent = torch.randn(1, 3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def decode(z: Tensor) -> Tensor:
        return decoder(z, (4, 5), chunk=chunk)

    assert torch.autograd.gradcheck(decode, (latent,), eps=1e-6, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_chunking_does_not_change_gradients(kind: str) -> None:
    decoder = decoder_of(kind).double().requires_grad_(True)
    results = []
    for chunk in (16, 100_000):
        latent = torch.linspace(-40, 40, 120, dtype=torch.float64).sin().reshape(2, 3, 4, 5).requires_grad_()
        decoder.zero_grad()
        image = decoder(latent, (20, 33), chunk=chunk)
        (image * torch.linspace(-1, 1, 33)).square().sum().backward()
        assert latent.grad is not None
        results.append([image.detach(), latent.grad, *(p.grad for p in decoder.parameters())])
    for one, other in zip(*results):
        assert one is not None and other is not None
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_gradient_keeps_no_activations_of_other_chunks(kind: str) -> None:
    """What autograd saves for backward grows with the image as three numbers a pixel, not as the hidden layers do."""
    decoder = decoder_of(kind)
    features = decoder.features(torch.randn(1, 3, 4, 4)).requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder.render(features, (64, 64), chunk=512)
    chunked = sum(saved)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder.render(features, (64, 64), chunk=64 * 64)
    assert chunked < 0.2 * sum(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_query_gradient_equals_the_grid_s(kind: str) -> None:
    decoder = decoder_of(kind)
    latent = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index_y, index_x = torch.meshgrid(torch.arange(8), torch.arange(11), indexing="ij")
    queries = decoder.query(
        decoder.features(latent), (8, 11), index_y.reshape(1, -1).expand(2, -1), index_x.reshape(1, -1).expand(2, -1)
    )
    (by_query,) = torch.autograd.grad(queries.square().sum(), latent)
    (by_grid,) = torch.autograd.grad(decoder(latent, (8, 11)).square().sum(), latent)
    assert torch.allclose(by_query, by_grid, rtol=1e-3, atol=1e-5 * float(by_grid.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_stage_two_leaves_decoder_and_encoder_alone(kind: str) -> None:
    """Steps on the denoiser through the frozen decoder: it learns; the others stay bit for bit and get no gradient."""
    bundle = small_bundle(decoder=kind)
    decoder, denoiser, schedule = bundle.decoder, bundle.denoiser, Schedule(bundle.config.schedule)
    assert decoder is not None and denoiser is not None
    denoiser.requires_grad_(True)
    frozen = {"encoder": bundle.autoencoder, "decoder": decoder}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in frozen.items()}
    denoiser_before = copy.deepcopy(denoiser.state_dict())
    optimizer = torch.optim.Adam([p for part in (denoiser, *frozen.values()) for p in part.parameters()], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    for _ in range(3):
        z0 = bundle.autoencoder.encode(image)
        eps, t = torch.randn(z0.shape, generator=generator), torch.randint(0, 1000, (2,), generator=generator)
        z_t = schedule.add_noise(z0, eps, t)
        x0_pred = schedule.to_x0(z_t, denoiser(z_t, t), t)
        loss = (decoder(x0_pred, (24, 20), chunk=100) - image[:, :, :24, :20]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in denoiser.parameters())
        assert all(p.grad is None for part in frozen.values() for p in part.parameters())
        optimizer.step()
    for name, part in frozen.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items()), name
    assert all(not torch.equal(v, denoiser_before[k]) for k, v in denoiser.state_dict().items())
