"""The only file that knows DeepSpeed: ZeRO partitions optimizer state (stage 1), gradients (2) and weights (3) over the
workers, reduces gradients and clips them. The learning rate, the averaged weights and what is in a checkpoint are this
project's.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from training.config import StageConfig
from training.ema import Fragment
from training.engine_base import AveragingEngine
from training.not_finite import skip_unless_finite
from training.older_checkpoints import readable
from training.optim import make_optimizer, set_lr
from training.precision import cast
from training.world import World


class DeepSpeedEngine(AveragingEngine):
    """See `training.engine.Engine`. Uses the process group that exists already (gloo or nccl)."""

    name = "deepspeed"

    def __init__(self, module: nn.Module, config: StageConfig, world: World, accumulation: int) -> None:
        deepspeed = _import_deepspeed(world.device)
        super().__init__(config, world)
        exact: dict[str, Tensor] = {}
        if config.precision == "fp16":
            exact = {n: p.detach().to("cpu", copy=True) for n, p in module.named_parameters() if p.requires_grad}
        module.to(world.device)
        self._optimizer = make_optimizer(module, config, world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            config=deepspeed_config(config, world, accumulation, sum(p.numel() for p in module.parameters())),
        )
        self.module = self._engine.module
        if not config.zero_stage and config.precision == "fp16":
            # This wrapper fills Adam's state by a step on zero gradients, which would count as the first step.
            self._optimizer.state.clear()
        if config.zero_stage == 3:
            _gather_decoder_whole(deepspeed, self.module)
        self._fragments = self._find_fragments()
        if exact:
            self._restore_masters(exact)
        self._begin_averages()

    def fragments(self) -> list[Fragment]:
        """Master weights: under ZeRO 1 to 3 this worker's part of them."""
        return self._fragments

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    @torch.no_grad()
    def average_into(self, tensors: Mapping[str, Tensor]) -> None:
        for name, shape, whole in self._in_place(self._averages()):
            if self.world.size > 1:
                torch.distributed.all_reduce(whole)
            tensors[name].copy_(whole.view(shape))

    def _forward(self, *inputs: Any) -> Any:
        given = [cast(value, self.dtype) for value in inputs] if self.config.precision == "fp16" else list(inputs)
        if self.config.channels_last:
            given = [_channels_last(value) for value in given]
        return self._engine(*given)

    def _update(self, lr: float) -> Tensor:
        set_lr(self._engine.optimizer, lr)
        whole_norm = self._unpartitioned_norm()
        if whole_norm is not None:  # where DeepSpeed takes the norm itself, it skips such steps itself
            skip_unless_finite(self._optimizer, whole_norm)
        self._engine.step()
        norm = whole_norm if whole_norm is not None else self._engine.get_global_grad_norm()
        norm = float("nan") if norm is None else norm
        # DeepSpeed says a number of a step that it left out. Figures of many steps are read at once, from one device.
        return norm if isinstance(norm, Tensor) else torch.full((), norm, device=self.world.device)

    def _unpartitioned_norm(self) -> Tensor | None:
        """ZeRO 0 on float32 weights clips by torch's function and keeps no norm, so it is taken here."""
        if self.config.zero_stage or self.config.precision == "fp16":
            return None
        return nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def _state(self) -> dict[str, Any]:
        recorder = _Recorder()
        original, self._engine.checkpoint_engine = self._engine.checkpoint_engine, recorder
        self._engine._copy_recovery_script = lambda save_path: None
        try:
            with tempfile.TemporaryDirectory(prefix="latentzoom-") as folder:
                self._engine.save_checkpoint(folder, tag="step", save_latest=False)
                root = Path(folder, "step")
                return {Path(path).relative_to(root).as_posix(): state for path, state in recorder.saved.items()}
        finally:
            self._engine.checkpoint_engine = original

    def _holds_averages(self) -> bool:
        return bool(self.config.zero_stage) or self.world.is_main

    def _load_state(self, folder: Path, saved_world_size: int) -> None:
        if saved_world_size != self.world.size and self.config.zero_stage:
            self._load_universal(folder)
        else:
            self._load(folder)
        self._fragments = self._find_fragments()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _full_shape(parameter) for name, parameter in self._trained()}

    def _on_main(self, fragments: list[Fragment]) -> dict[str, Tensor] | None:
        full: dict[str, Tensor] = {}
        for name, shape, whole in self._in_place(fragments):
            if self.world.size > 1:
                torch.distributed.reduce(whole, dst=0)
            if self.world.is_main:
                full[name] = whole.cpu().reshape(shape)
        return full if self.world.is_main else None

    def _in_place(self, fragments: list[Fragment]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Name, shape and a flat tensor of each trained parameter: this worker's part of it, zeros elsewhere."""
        by_name = {fragment.name: fragment for fragment in fragments}
        for name, shape in self._shapes().items():
            whole = torch.zeros(int(torch.Size(shape).numel()), device=self.world.device)
            if (fragment := by_name.get(name)) is not None and self._holds_averages():
                whole[fragment.start : fragment.start + fragment.numel] = fragment.tensor.view(-1)
            yield name, shape, whole

    def _load(self, folder: Path) -> None:
        with readable(folder, list(self._shapes()), self.config.zero_stage) as made:
            path, _ = self._engine.load_checkpoint(str(made.parent), tag=made.name, load_lr_scheduler_states=False)
        if path is None:
            raise UserError(f"DeepSpeed could not load the checkpoint {folder}")

    def _load_universal(self, folder: Path) -> None:
        """Another number of workers: rewrite the checkpoint one file per parameter, then load that."""
        with tempfile.TemporaryDirectory(prefix="latentzoom-universal-") as scratch:
            shared = Path(self.world.broadcast(scratch))
            target = shared / "universal"
            if self.world.local_rank == 0:
                _to_universal(folder, target, self.config.zero_stage)
            self.world.barrier()
            self._engine._config.load_universal_checkpoint = True
            try:
                self._load(target)
            finally:
                self._engine._config.load_universal_checkpoint = False
                self.world.barrier()

    def _find_fragments(self) -> list[Fragment]:
        masters = self._unpartitioned_masters()
        fragments = []
        for name, parameter in self._trained():
            if hasattr(parameter, "ds_id"):
                fragments.append(_zero3_fragment(name, parameter, self.world.rank))
            elif hasattr(parameter, "_hp_mapping"):
                if (mapping := parameter._hp_mapping) is not None:
                    start = mapping.lp_fragment_address.start
                    fragments.append(Fragment(name, tuple(parameter.shape), start, mapping.hp_fragment.detach()))
            else:
                master = masters.get(parameter, parameter)
                fragments.append(Fragment(name, tuple(parameter.shape), 0, master.detach().view(-1)))
        return fragments

    @torch.no_grad()
    def _restore_masters(self, exact: dict[str, Tensor]) -> None:
        """DeepSpeed makes its float32 masters from weights that it has rounded to half precision already; put the exact
        ones in, or a run of no steps at all would change the weights that it was given."""
        for fragment in self._fragments:
            whole = exact[fragment.name].flatten()
            fragment.tensor.copy_(whole[fragment.start : fragment.start + fragment.numel].view(fragment.tensor.shape))

    def _unpartitioned_masters(self) -> dict[Any, Tensor]:
        """ZeRO 0 in half precision keeps float32 copies beside the weights; in float32 the weights are the masters."""
        optimizer = self._engine.optimizer
        half, masters = getattr(optimizer, "fp16_groups", None), getattr(optimizer, "fp32_groups", None)
        if self.config.zero_stage or half is None or masters is None:
            return {}
        return {p: m for group, copies in zip(half, masters) for p, m in zip(group, copies)}


class _Recorder:
    """A DeepSpeed checkpoint engine that keeps what it is given instead of writing it."""

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        self.saved[path] = state_dict

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def preserves_storage_sharing(self) -> bool:
        return False


def _import_deepspeed(device: torch.device) -> Any:
    """The module, working on the device that was decided for this worker: on its own it takes any GPU it sees."""
    os.environ["DS_ACCELERATOR"] = device.type  # read when it is imported
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"DeepSpeed is not installed ({error}); install it, or train with --local") from error
    from deepspeed.accelerator import get_accelerator

    if (found := torch.device(get_accelerator().current_device_name()).type) != device.type:
        raise UserError(f"DeepSpeed was set up for {found} in this process, and training is to run on {device.type}")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # With ZeRO-3 torch would say at every step that DeepSpeed calls functions which it is going to rename.
    warnings.filterwarnings("ignore", r"`torch\.distributed\._(all_gather|reduce_scatter)_base`", FutureWarning)
    # This operator is compiled for a minute on first use, and serves only launchers that set LOCAL_SIZE.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def bucket_size(num_parameters: int) -> int:
    """Values that DeepSpeed reduces at once: an eighth of the network, so that reduction overlaps with the rest of the
    backward pass, within limits that keep a network card busy and the buffers (two of them) below half a gigabyte. An
    even number, as DeepSpeed asks."""
    bucket = min(num_parameters, 50_000_000, max(num_parameters // 8, 2_000_000))
    return bucket + bucket % 2


def deepspeed_config(config: StageConfig, world: World, accumulation: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's own settings for a network of so many parameters."""
    bucket, zero = bucket_size(num_parameters), config.zero_stage
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.global_batch // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": world.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            **({"stage3_prefetch_bucket_size": bucket} if zero == 3 else {"allgather_bucket_size": bucket}),
        },
        # bf16 is autocast: weights, gradients and what the workers exchange stay float32, and so does what the networks
        # compute outside autocast (pipeline.precision). DeepSpeed's own bf16 would round every weight, codebooks too.
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def _full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape) if hasattr(parameter, "ds_id") else tuple(parameter.shape)


def _zero3_fragment(name: str, parameter: Any, rank: int) -> Fragment:
    """ZeRO 3 cuts each parameter into equal parts, one a worker, the last ones padded."""
    from deepspeed.utils import safe_get_local_fp32_param

    local = safe_get_local_fp32_param(parameter).detach()
    size = int(parameter.ds_tensor.ds_numel)
    owned = max(0, min(size, int(parameter.ds_numel) - rank * size))
    return Fragment(name, tuple(parameter.ds_shape), rank * size if owned else 0, local[:owned])


def _gather_decoder_whole(deepspeed: Any, module: nn.Module) -> None:
    """The implicit decoder reads weights of its layers directly, so ZeRO 3 must fetch it as one piece."""
    if any(isinstance(part, ImplicitDecoder) for part in module.modules()):
        deepspeed.utils.set_z3_leaf_modules(module, [ImplicitDecoder])


def _to_universal(folder: Path, target: Path, zero_stage: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(None):
        ds_to_universal.main(options)
