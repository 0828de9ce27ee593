"""Memory that is kept is not mapped anew: counted in page faults, not in time."""

from __future__ import annotations

import resource

import pytest
import torch

from pipeline.allocator import keep_freed_memory

_NUM, _BYTES = 12, 48 << 20


def faults() -> int:
    """Page faults of large tensors that come and go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(_NUM):
        torch.empty(_BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_large_tensors_cost_page_faults_once_and_only_within() -> None:
    with keep_freed_memory() as is_kept:
        if not is_kept:
            pytest.skip("this system's C library is not glibc")
        faults()
        within = faults()
    after = faults()
    if after < 100:
        pytest.skip("this system maps large pages, which cost no faults to speak of")
    assert within < after / 4
