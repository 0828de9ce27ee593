import pytest
import torch

from training.ema import Ema, Fragment, assemble, decay_at, to_tensors


def _fragments(weight: torch.Tensor, num_workers: int) -> list[list[Fragment]]:
    flat = weight.view(-1)
    bounds = [round(i * len(flat) / num_workers) for i in range(num_workers + 1)]
    return [[Fragment("w", tuple(weight.shape), a, flat[a:b])] for a, b in zip(bounds, bounds[1:])]


def test_average_in_pieces_equals_the_plain_one_after_500_steps() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    reference = weight.double().clone()
    parts = _fragments(weight, 2)
    averages = [Ema(part) for part in parts]
    for step in range(1, 501):
        weight += 0.1 * torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        decay = decay_at(step, 0.999, warmup=True)
        reference = decay * reference + (1 - decay) * weight.double()
        for ema, part in zip(averages, parts):
            ema.update(part, decay)
    saved = [to_tensors(ema.fragments(part)) for ema, part in zip(averages, parts)]
    whole = assemble(saved, {"w": (3, 5)})["w"]
    torch.testing.assert_close(whole.double(), reference, rtol=0, atol=1e-6)

    # the same averages in three pieces, as after a change of the number of workers
    for part in _fragments(torch.zeros(3, 5), 3):
        ema = Ema(part)
        ema.load(part, {"w": whole})
        start = part[0].start
        assert torch.equal(ema.averages[0], whole.view(-1)[start : start + part[0].numel])


def test_gap_is_an_error() -> None:
    parts = [to_tensors(part) for part in _fragments(torch.zeros(3, 5), 3)]
    with pytest.raises(ValueError, match="gap"):
        assemble([parts[0], parts[2]], {"w": (3, 5)})
    with pytest.raises(ValueError, match="hold"):
        assemble(parts[:2], {"w": (3, 5)})


def test_decay_warms_up() -> None:
    assert decay_at(1, 0.9999, warmup=True) == pytest.approx(2 / 11)
    assert decay_at(10**6, 0.9999, warmup=True) == 0.9999
    assert decay_at(1, 0.9999, warmup=False) == 0.9999
