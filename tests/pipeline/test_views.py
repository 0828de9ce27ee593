"""A model in use changes nothing of the networks it was given: somebody may be training them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_direct import direct_bundle
from small_models import small_bundle
from torch import nn

from pipeline.bundle import Bundle
from pipeline.model import LatentZoom
from pipeline.views import view_of


def modules_of(bundle: Bundle) -> list[nn.Module]:
    return [part for part in (bundle.autoencoder, bundle.decoder, bundle.denoiser) if part is not None]


def state_of(bundle: Bundle) -> list[Any]:
    """Everything that training would notice."""
    facts: list[Any] = []
    for part in modules_of(bundle):
        facts += [(name, module.training) for name, module in part.named_modules()]
        for name, p in part.named_parameters():
            facts.append((name, id(p), p.data_ptr(), p.stride(), p.dtype, p.requires_grad, p._version))
        facts += [(name, id(b), b.dtype) for name, b in part.named_buffers()]
    return facts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: small_bundle("sr"), direct_bundle])
def test_the_networks_of_a_bundle_stay_as_they_are(make: Any, dtype: torch.dtype) -> None:
    bundle = make()
    calls: list[str] = []
    for part in modules_of(bundle):
        part.train()
        part.register_forward_hook(lambda *_: calls.append("hook"))
    before = state_of(bundle)
    model = LatentZoom(bundle, dtype=dtype)
    model.upscale(torch.zeros(6, 8, 3, dtype=torch.uint8).numpy(), 2.0, num_steps=1)
    assert state_of(bundle) == before and not calls
    assert model.decoder is not None and not model.decoder.training


def test_a_view_takes_no_memory_and_sees_what_is_learnt() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    network.append(network[0])  # one part in two places
    view = view_of(network)
    assert view[0].weight.data_ptr() == network[0].weight.data_ptr() and view[2] is view[0] is not network[0]
    with torch.no_grad():
        network[0].weight.fill_(2.0)
        network(torch.randn(5, 3))  # new statistics
    assert torch.equal(view(torch.ones(4, 3)), network.eval()(torch.ones(4, 3)))
    view.double()
    assert network[0].weight.dtype == torch.float32 and view[0].weight.dtype == torch.float64
