"""The DeepSpeed engine averages weights in the pieces ZeRO makes of them; put together they are the plain average."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.config import StageConfig
from training.engine import make_engine
from training.engine_deepspeed import DeepSpeedEngine
from training.power_ema import LENGTHS, exponent
from training.world import World

_STEPS, _BATCH = 500, 4
_FEATURES = 7
# ZeRO stage, precision, and whether the decay warms up; without warm-up the weights at the start count to the end.
_CASES = [(1, "fp32", False), (1, "bf16", True), (3, "fp32", False), (3, "bf16", True)]


def network() -> nn.Module:
    """262 trained parameters in tensors that two workers cannot halve; of the last, one element, a worker has none."""
    torch.manual_seed(0)
    frozen = nn.Linear(_FEATURES, _FEATURES).requires_grad_(False)
    return nn.Sequential(frozen, nn.Linear(_FEATURES, 29), nn.Tanh(), nn.Linear(29, 1))


def batch(step: int) -> Tensor:
    return torch.randn(_BATCH, _FEATURES, generator=torch.Generator().manual_seed(step))


def train_and_average(zero_stage: int, precision: str, warmup: bool, world: World) -> dict[str, Tensor]:
    """Train → the engine's averages, those of the whole weights in float64, and the last weights, by kind and name.
    The averages are the exponential one and, under kinds with their length, the power-function ones."""
    config = StageConfig(
        steps=_STEPS,
        global_batch=_BATCH,
        ema_decay=0.98 if warmup else 0.999,  # warm-up ends in step 440, late enough to be still felt
        ema_warmup=warmup,
        precision=precision,  # type: ignore[arg-type]
        zero_stage=zero_stage,
        power_ema_every=1,
    )
    engine = make_engine(network(), config, world, deepspeed=True)
    assert isinstance(engine, DeepSpeedEngine)
    reference = whole_weights(engine.module)
    powers = {length: whole_weights(engine.module) for length in LENGTHS}
    for step in range(1, _STEPS + 1):
        share = batch(step).chunk(world.size)[world.rank]
        target = share.sum(dim=1, keepdim=True).sin()
        engine.backward((engine(share) - target).square().mean())
        engine.step(step, lr=3e-3)
        weights = whole_weights(engine.module)
        decay = min(0.98, (1 + step) / (10 + step)) if warmup else 0.999
        for name, average in reference.items():
            average.mul_(decay).add_(weights[name], alpha=1 - decay)
        for length, averages in powers.items():
            for name, average in averages.items():
                average.lerp_(weights[name], 1 - (1 - 1 / step) ** (exponent(length) + 1))
    everywhere = {name: torch.zeros(average.shape) for name, average in reference.items()}
    engine.average_into(everywhere)  # on every worker: the others say so
    rows = [float(sum(tensor.double().sum() for tensor in everywhere.values()))]
    assert len(set(world.gather(rows[0]))) == 1
    kinds = {"averaged": engine.averaged() or {}, "reference": reference, "last": weights, "everywhere": everywhere}
    for length, averages in (engine.power_averages() or {}).items():
        kinds |= {f"power {length}": averages, f"power {length} reference": powers[length]}
    return {f"{kind}:{name}": tensor for kind, state in kinds.items() for name, tensor in state.items()}


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's float32 weights as DeepSpeed itself puts them together. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_fp32_param(p).detach().double() for name, p in trained.items()}


def one_worker(folder: Path, rank: int, size: int) -> None:
    """What the test starts: all cases one after another, since starting takes longer than training."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    world = World(rank, size, rank, torch.device("cpu"))
    for case in _CASES:
        result = train_and_average(*case, world)
        if world.is_main:
            save_file(result, folder / f"{case}.safetensors")


def start(folder: Path, rank: int, size: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, str(folder), str(rank), str(size)]
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    with open(folder / f"{rank}.log", "wb") as log:  # a pipe that nobody reads yet would fill up and stop the worker
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **here})


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.more), 2])
def test_partitioned_average_equals_the_plain_one_after_500_steps(tmp_path: Path, num_workers: int) -> None:
    workers = [start(tmp_path, rank, num_workers) for rank in range(num_workers)]
    try:
        for rank, worker in enumerate(workers):
            assert worker.wait(timeout=300) == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()  # one whose partner failed would wait for it
            worker.wait()
    trained = {name for name, p in network().named_parameters() if p.requires_grad}
    for case in _CASES:
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(tmp_path / f"{case}.safetensors").items():
            kind, _, name = key.partition(":")
            kinds.setdefault(kind, {})[name] = tensor.double()
        assert all(found.keys() == trained for found in kinds.values()) and len(kinds) == 4 + 2 * len(LENGTHS), case
        for name, expected in kinds["reference"].items():
            # An average near the last weights could be mistaken for them.
            assert (kinds["last"][name] - expected).abs().max() > 1e-4, (case, name)
            powers = [(kinds[f"power {s}"][name], kinds[f"power {s} reference"][name]) for s in LENGTHS]
            pairs = [(kinds["averaged"][name], expected), (kinds["everywhere"][name], expected), *powers]
            for found, wanted in pairs:
                torch.testing.assert_close(
                    found, wanted, rtol=0, atol=1e-6, msg=lambda text, at=(case, name): f"{at}: {text}"
                )


if __name__ == "__main__":
    one_worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
