import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orchestration.cluster.ray_train import launch, with_equal_memory
from pipeline.bundle import build_decoder, build_denoiser
from pipeline.errors import UserError
from training.cli import main
from training.config import AlignStage, DecoderStage, StageConfig, override, preset_from_dict, preset_to_dict
from training.engine import accumulation_steps
from training.engine_deepspeed import bucket_size, deepspeed_config
from training.estimate import check_memory, dry_run, estimate, peak_flops
from training.optim import lr_at
from training.presets import PRESETS, debug, get_preset
from training.targets import Target, draw_target, largest_target, render_target, window_side
from training.world import World


def test_override_reaches_nested_fields_and_keeps_the_rest() -> None:
    preset = override(debug(), ["align.lr=1e-7", "model.decoder.mlp_width=24", "align.loss=l1", "decoder.compile=true"])
    assert preset.align == dataclasses.replace(debug().align, lr=1e-7, loss="l1")
    assert preset.model.decoder.mlp_width == 24 and preset.decoder.compile is True
    assert preset.autoencoder == debug().autoencoder


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("align.learning_rate=1", "align.learning_rate"),
        ("nosuch.lr=1", "nosuch"),
        ("align.lr=fast", "align.lr"),
        ("align.lr=0", "lr"),
        ("align.steps=2.5", "align.steps"),
        ("decoder.precision=int8", "precision"),
        ("align.lr", "align.lr"),
        ("align.lr.x=1", "align.lr.x"),
    ],
)
def test_wrong_overrides_name_the_setting(setting: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        override(debug(), [setting])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    preset = get_preset(name)
    assert preset_from_dict(preset_to_dict(preset)) == preset


SIZED = ("demo", "starter", "debug", "ffhq-256")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SIZED else [pytest.mark.slow, pytest.mark.more]) for n in PRESETS]
)
def test_presets_can_be_sized_up(name: str) -> None:
    assert "trained parameters" in dry_run("align", get_preset(name), 1, "cpu")


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="ffhq-256"):
        get_preset("ffhq-255")


def test_paper_sizes() -> None:
    assert get_preset("celebahq-sr-16-128").model.lr_size == 16
    assert get_preset("ffhq-256").decoder.lr == 5e-5 and get_preset("ffhq-256").align.lr == 1e-6
    assert (get_preset("div2k-sr").decoder.min_size, get_preset("div2k-sr").decoder.max_size) == (48, 192)


def test_learning_rate_warms_up_then_falls() -> None:
    config = StageConfig(steps=110, lr=1.0, warmup_steps=10, schedule="cosine")
    assert lr_at(1, config) == pytest.approx(0.1) and lr_at(10, config) == pytest.approx(1.0)
    assert lr_at(60, config) == pytest.approx(0.5) and lr_at(110, config) == pytest.approx(0.0)
    assert lr_at(500, dataclasses.replace(config, schedule="constant")) == 1.0


def test_target_sizes_include_both_ends_and_windows_fit() -> None:
    config = DecoderStage(min_size=30, max_size=32, crop=16)
    targets = [draw_target(config, debug().model, step) for step in range(200)]
    assert {t.size for t in targets} == {(30, 30), (31, 31), (32, 32)}
    assert all(
        y0 >= 0 and y1 <= t.size[0] and y1 - y0 == x1 - x0 == 16 for t in targets for y0, x0, y1, x1 in [t.window]
    )
    assert len({t.window for t in targets}) > 50
    whole = draw_target(AlignStage(), debug().model, 1)
    assert whole.window == (0, 0, *whole.size)


def test_windows_in_cells_cover_as_much_of_every_size() -> None:
    model = debug().model
    assert model.latent_size == 8
    config = AlignStage(min_size=8, max_size=96, crop_cells=2)
    for step in range(50):
        target = draw_target(config, model, step)
        y0, x0, y1, x1 = target.window
        assert y1 - y0 == x1 - x0 == max(1, 2 * target.size[0] // 8)
        assert min(y0, x0) >= 0 and max(y1, x1) <= target.size[0]
    assert window_side(dataclasses.replace(config, crop=10), model, 96) == 10
    assert window_side(dataclasses.replace(config, crop_cells=20), model, 96) == 96
    assert largest_target(config, model).window == (36, 36, 60, 60)


@pytest.mark.parametrize("size", [19, 32, 45])
def test_window_from_its_neighbourhood_is_the_window_of_the_whole(size: int) -> None:
    """With enough context nothing is left out, so the geometry must be exact; with little it must still be close."""
    torch.manual_seed(0)
    decoder = build_decoder(debug().model)
    latent = torch.randn(2, 3, 16, 12)
    for window in [(0, 0, 6, 5), (3, 7, 11, 12), (size - 4, size - 9, size, size)]:
        target = Target((size, size), window)
        whole = decoder(latent, target.size, target.window)
        torch.testing.assert_close(render_target(decoder, latent, target, 16), whole, rtol=0, atol=1e-6)
        near = render_target(decoder, latent, target, 4)
        assert near.shape == whole.shape and (near - whole).std() < 0.5 * whole.std()


def test_dry_run_prints_the_numbers_of_the_run() -> None:
    preset = override(
        debug(), ["align.steps=1200", "align.global_batch=6", "align.micro_batch=2", "align.zero_stage=2"]
    )
    rows = {line[:20].strip(): line[21:] for line in dry_run("align", preset, 3, "cpu").splitlines()}
    trained, frozen = build_denoiser(preset.model), build_decoder(preset.model)
    num, num_frozen = (sum(p.numel() for p in part.parameters()) for part in (trained, frozen))
    assert rows["stage"] == "align of preset debug"
    assert (rows["trained parameters"], rows["frozen parameters"]) == (f"{num:,}", f"{num_frozen:,}")
    assert rows["workers"] == "3 on cpu, ZeRO 2, fp32"
    assert rows["global batch"] == "6, 2 at once" and rows["steps"] == "1,200"
    # A worker: whole weights and frozen ones; its third of gradients, masters, two moments and averages, in float32;
    # and two buckets, of the whole network as it is small. Held-out figures have copies of the averaged network and of
    # the frozen one.
    state = 4 * num + 4 * num // 3 + num * (4 + 8 + 4) // 3 + 2 * 4 * bucket_size(num) + 4 * num_frozen
    state += 4 * num + 4 * num_frozen
    assert f"state {state / 2**20:.1f} MiB" in rows["memory of a worker"]
    # Six samples: forward and twice that backward; of the frozen decoder forward and the gradient by its input only, at
    # the sizes that steps draw.
    latent, t = torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        trained(latent, t)
    rendered = []
    for step in range(1, 41):
        target = draw_target(preset.align, preset.model, step)
        with FlopCounterMode(display=False) as behind:
            frozen(latent, target.size, target.window)
        rendered.append(behind.get_total_flops())
    work = estimate("align", preset.align, preset.model, 3).flops_per_step
    assert len(set(rendered)) > 10
    assert work == pytest.approx(3 * counter.get_total_flops() + 2 * sum(rendered) / 40, rel=0.15)
    assert rows["work of a step"] == f"{work / 1e9:,.1f} GFLOP"


def test_deepspeed_is_told_the_batch_the_precision_and_no_offload() -> None:
    world = World(0, 2, 0, torch.device("cpu"))
    config = dataclasses.replace(debug().denoiser, global_batch=12, precision="bf16", zero_stage=3, clip_norm=0.5)
    told = deepspeed_config(config, world, 3, 300_000_000)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [told[name] for name in sizes] == [12, 2, 3]
    assert told["zero_optimization"] == {  # nothing is offloaded
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 37_500_000,
        "stage3_prefetch_bucket_size": 37_500_000,
    }
    assert told["torch_autocast"]["enabled"] and not told["fp16"]["enabled"] and told["gradient_clipping"] == 0.5


def test_the_page_prints_what_deepspeed_is_told() -> None:
    page = Path(__file__).parents[2].joinpath("docs/verbs/train.md").read_text()
    [printed] = re.findall(r"^```json deepspeed\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    preset, world = get_preset("ffhq-256"), World(0, 8, 0, torch.device("cuda"))
    with torch.device("meta"):
        num = sum(parameter.numel() for parameter in build_denoiser(preset.model).parameters())
    told = deepspeed_config(preset.denoiser, world, accumulation_steps(preset.denoiser, world.size), num)
    assert json.loads(printed) == told


@pytest.mark.parametrize(
    ("num", "expected"),
    [(5_001, 5_002), (4_000_000, 2_000_000), (274_000_008, 34_250_002), (10**10, 50_000_000)],
)
def test_buckets_are_smaller_than_the_network_so_that_their_reduction_overlaps(num: int, expected: int) -> None:
    assert bucket_size(num) == expected


def test_a_grid_and_the_frozen_decoder_need_memory_too() -> None:
    preset = override(debug(), ["align.grid_every=0", "align.validate_every=0", "align.precision=bf16"])
    with_grids = override(preset, ["align.grid_every=5"])
    num = estimate("align", preset.align, preset.model, 1).parameters
    plain, drawn = (estimate("align", p.align, p.model, 1) for p in (preset, with_grids))
    assert drawn.state_bytes - plain.state_bytes == 4 * num  # the averaged network
    # Behind a denoiser of half precision the frozen decoder computes in float32, but on CUDA.
    exact = override(preset, ["align.precision=fp32"])
    denoiser, both = (estimate(s, exact.stage(s), exact.model, 1).activation_bytes for s in ("denoiser", "align"))
    behind = both - denoiser * exact.align.global_batch // exact.denoiser.global_batch
    assert plain.activation_bytes == pytest.approx((both - behind) / 2 + behind, rel=0.02)
    there = estimate("align", preset.align, preset.model, 1, "cuda")
    assert there.activation_bytes == pytest.approx(both / 2, rel=0.02)


def test_only_free_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = estimate("denoiser", debug().denoiser, debug().model, 1).total_bytes
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    for free, fits in ((needed + 1, True), (needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        check = partial(check_memory, "denoiser", debug().denoiser, debug().model, 1, torch.device("cuda"))
        if fits:
            check()
        else:
            with pytest.raises(UserError, match="free of 80.00 GiB; lower micro_batch"):
                check()


def test_engines_that_split_nothing_are_sized_so(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed shares the optimizer's state among the workers; with ddp each has it all."""
    words = ["denoiser", "--preset", "ffhq-256", "--data", "d", "--run-dir", "r", "--workers", "8", "--dry-run"]
    told = {}
    for engine in ("deepspeed", "ddp"):
        assert main([*words, "--device", "cpu", "--engine", engine]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("workers")]
        told[engine] = line
    assert "ZeRO 1" in told["deepspeed"] and "ZeRO 0" in told["ddp"]


def test_dry_run_refuses_what_the_run_would_refuse() -> None:
    with pytest.raises(UserError, match="micro_batch = 3 does not divide"):
        dry_run("denoiser", override(debug(), ["denoiser.micro_batch=3"]), 1, "cpu")
    with pytest.raises(UserError, match="cannot be shared by 3 workers"):
        dry_run("denoiser", debug(), 3, "cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", None),
    ],
)
def test_peak_is_that_of_the_device_or_unknown(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak


def test_local_means_one_worker(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["denoiser", "--preset", "debug", "--data", "shards", "--run-dir", "run", "--local", "--workers", "2"]
    assert main(words) == 2
    assert "leave out --workers" in capsys.readouterr().err


def test_an_elastic_run_of_no_possible_size_is_refused_before_it_starts() -> None:
    config = dataclasses.replace(debug().denoiser, global_batch=8, micro_batch=8)
    with pytest.raises(UserError, match="micro_batch = 8 does not divide a worker's share of 4"):
        launch("denoiser", dataclasses.replace(debug(), denoiser=config), data="d", run_dir="r", num_workers=(2, 2))
    with pytest.raises(UserError, match="global_batch = 8 cannot be shared by 3 workers"):
        launch("denoiser", dataclasses.replace(debug(), denoiser=config), data="d", run_dir="r", num_workers=(2, 3))


def test_zero_stages_and_precision_shrink_the_state() -> None:
    def state(**changes: object) -> int:
        config = dataclasses.replace(debug().denoiser, validate_every=0, **changes)  # type: ignore[arg-type]
        return estimate("denoiser", config, debug().model, 2).state_bytes

    num = estimate("denoiser", debug().denoiser, debug().model, 2).parameters
    assert state(zero_stage=0) == num * (4 + 4 + 8 + 4)  # weights, gradients, two moments, averages
    # And masters, all split in two; two buckets of the whole network, as it is small.
    assert state(zero_stage=3, precision="fp16") == (2 + 2 + 4 + 8 + 4) * num // 2 + 2 * 2 * bucket_size(num)
    # Autocast: the weights are the masters.
    assert state(zero_stage=3, precision="bf16") == (4 + 4 + 8 + 4) * num // 2 + 2 * 4 * bucket_size(num)
    assert state(zero_stage=1) > state(zero_stage=2) > state(zero_stage=3)


def test_estimated_activations_are_those_that_a_step_keeps() -> None:
    """Attention among many places too, whose matrix of all pairs no device keeps."""
    model = override(debug(), ["model.image_size=128", "model.denoiser.attention_factors=[1]"]).model
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_leaf:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        build_denoiser(model)(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)).sum()
    guess = estimate("denoiser", debug().denoiser, model, 1).activation_bytes
    assert guess == pytest.approx(sum(kept.values()), rel=0.15)


def test_smaller_windows_are_estimated_smaller() -> None:
    model = debug().model
    whole, window = (estimate("align", AlignStage(crop_cells=cells), model, 1).activation_bytes for cells in (0, 2))
    near = estimate("align", AlignStage(crop_cells=2, context_cells=1), model, 1).activation_bytes
    assert near < window < whole


def test_activation_checkpointing_keeps_less() -> None:
    plain = estimate("denoiser", debug().denoiser, debug().model, 1)
    frugal = estimate(
        "denoiser", dataclasses.replace(debug().denoiser, activation_checkpointing=True), debug().model, 1
    )
    assert frugal.activation_bytes < 0.7 * plain.activation_bytes


@pytest.mark.parametrize(("num_workers", "expected"), [(4, 0), (3, 8), (2, 12), (1, 12)])
def test_workers_of_a_smaller_elastic_run_hold_no_more_at_once(num_workers: int, expected: int) -> None:
    preset = override(debug(), ["align.global_batch=48"])
    smaller = with_equal_memory(preset, "align", num_workers, most=4)
    assert smaller.align.micro_batch == expected
    chosen = override(preset, ["align.micro_batch=4"])
    assert with_equal_memory(chosen, "align", num_workers, most=4) == chosen
