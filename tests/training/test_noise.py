"""Counter-based noise: the published generator, its statistics, and that it belongs to step and sample alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from training.noise import Draws, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123, the authors' library: philox4x32, 10 rounds
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_words_are_those_of_the_published_generator(
    counter: list[int], key: tuple[int, int], expected: list[int]
) -> None:
    words = philox(*(torch.tensor([word]) for word in counter), key=key)
    assert [int(word) for word in words] == expected


def test_numbers_belong_to_key_and_sample_not_to_the_batch() -> None:
    def drawn(index: range, *key: int | str) -> tuple[torch.Tensor, ...]:
        draws = Draws(index, "cpu", *key)
        return draws.integers(1000), draws.normal((3, 5, 7)), draws.uniform()

    whole = drawn(range(12), 7, "diffusion", 3)
    for start, stop in ((0, 4), (4, 12), (11, 12)):
        for part, all_of_it in zip(drawn(range(start, stop), 7, "diffusion", 3), whole):
            assert torch.equal(part, all_of_it[start:stop])
    for key in ((8, "diffusion", 3), (7, "posterior", 3), (7, "diffusion", 4)):
        assert not torch.equal(drawn(range(12), *key)[1], whole[1])
    assert len({tuple(row) for row in whole[1].flatten(1).tolist()}) == 12
    draws = Draws(range(2), "cpu", 1)
    assert not torch.equal(draws.normal((6,)), draws.normal((6,)))


def test_their_distributions_are_normal_and_uniform() -> None:
    draws = Draws(range(40), "cpu", 1, "statistics")
    noise = draws.normal((50, 51)).double().numpy().ravel()
    assert stats.kstest(noise, "norm").pvalue > 1e-3 and np.abs(noise).max() > 3.5
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02
    many = Draws(range(20000), "cpu", 2)
    assert stats.kstest(many.uniform().double().numpy(), "uniform").pvalue > 1e-3
    counts = np.bincount(many.integers(7).numpy(), minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 1e-3
