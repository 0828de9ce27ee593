"""What stays exact under bf16: codes, posteriors, coordinates, norms, averages. Plain, autocast and DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig, DecoderConfig, ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.geometry import axis_at
from pipeline.quantizer import Quantizer
from training.config import StageConfig
from training.engine import Engine, make_engine
from training.reconstruction import joint_first_stage
from training.world import World, current_world

CONFIG = StageConfig(global_batch=4, precision="bf16")


class Codes(nn.Module):
    """A quantiser of 8192 codes, and beside it a norm, as an engine would train them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.quantizer = Quantizer(8192, 3)
        self.quantizer.embedding.weight.data.copy_(torch.randn(8192, 3, generator=generator))
        self.norm = nn.GroupNorm(1, 3)
        self.norm.weight.data.copy_(1 + 0.3 * torch.randn(3, generator=generator))

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantised, loss = self.quantizer(latent)
        return self.quantizer.codes(latent), quantised, loss, self.norm(latent)


def latents() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def nearest(latent: Tensor, codebook: Tensor) -> Tensor:
    """By hand, in float64."""
    cells = latent.double().permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([(part[:, None] - codebook.double()).square().sum(-1).argmin(1) for part in cells.split(256)])


def check(results: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """An engine's results for `latents` are those of float32: codes one by one."""
    codes, quantised, loss, normed = results
    module = Codes()
    expected = nearest(latents(), module.quantizer.embedding.weight.detach())
    assert torch.equal(codes.flatten(), expected)
    chosen = F.embedding(expected.reshape(4, 12, 12), module.quantizer.embedding.weight).permute(0, 3, 1, 2)
    assert quantised.dtype == torch.float32
    torch.testing.assert_close(quantised, chosen.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, 1.25 * (chosen - latents()).square().mean().detach(), rtol=1e-5, atol=0)
    # Norms average in float32 and have float32 weights; a CPU may still hand their result on in half precision.
    torch.testing.assert_close(normed.float(), module.norm(latents()).detach(), rtol=2**-8, atol=2**-8)


def test_codes_under_the_plain_engine() -> None:
    check(make_engine(Codes(), CONFIG, current_world("cpu"), deepspeed=False)(latents()))


def test_norms_hand_on_float32() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    seen: list[tuple[Tensor, Tensor]] = []
    engine = make_engine(module, CONFIG, current_world("cpu"), deepspeed=False)
    module[1].register_forward_hook(lambda norm, inputs, made: seen.append((inputs[0].detach(), made.detach())))
    engine.backward(engine(latents()).square().mean())
    (given, made), *_ = seen
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, F.group_norm(given.float(), 2, module[1].weight, module[1].bias).detach())


def test_codes_under_autocast_and_where_matrix_products_are_rounded() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(Codes()(latents()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        check(Codes()(latents()))
    finally:
        torch.set_float32_matmul_precision(before)


def test_codes_of_latents_in_half_precision_are_those_of_the_same_numbers() -> None:
    module, latent = Codes(), latents().bfloat16()
    expected = nearest(latent, module.quantizer.embedding.weight.detach())
    assert torch.equal(module.quantizer.codes(latent).flatten(), expected)


def test_the_quantiser_is_diffusers_one() -> None:
    """Same weights, codes, gradient and loss as the independent implementation, whose names the weights carry."""
    from diffusers.models.autoencoders.vae import VectorQuantizer

    ours = Codes().quantizer
    theirs = VectorQuantizer(8192, 3, beta=0.25)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    gradients, losses = [], []
    for module in (ours, theirs):
        latent = latents().requires_grad_()
        quantised, loss, *_ = module(latent)
        (quantised.square().sum() + loss).backward()
        gradients += [latent.grad, module.embedding.weight.grad]
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[3])


def test_posterior_samples_are_drawn_in_float32() -> None:
    """exp and the sum are exact: what is handed to the decoder is the moments' own float32 sample."""
    config = AutoencoderConfig(kind="kl", base_width=8, width_mult=(1, 1), num_res_blocks=1, norm_groups=4)
    decoder = DecoderConfig(base_width=8, width_mult=(1,), num_res_blocks=1, norm_groups=4, mlp_width=8, mlp_depth=1)
    network = joint_first_stage(ModelConfig(image_size=16, autoencoder=config, decoder=decoder))
    seen: list[Tensor] = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    image, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 8, 8)
    engine = make_engine(network, CONFIG, current_world("cpu"), deepspeed=False)
    _, moments = engine(image, noise, (16, 16), (0, 0, 16, 16))
    mean, log_variance = moments.detach().double().chunk(2, dim=1)
    expected = mean + (0.5 * log_variance).exp() * noise
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_coordinates_are_not_rounded(half: str) -> None:
    """A head whose answer is the relative coordinate gives it before anything is rounded, under bf16 too: so
    neighbouring pixels of a large enlargement differ."""
    decoder = ImplicitDecoder(
        DecoderConfig(base_width=8, width_mult=(1,), num_res_blocks=1, norm_groups=4, mlp_width=8, mlp_depth=1), 3
    ).eval()
    decoder.requires_grad_(half == "autocast")
    head = decoder.head
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.hidden[0].weight[0, 8], head.hidden[0].bias[0] = 256.0, -182.0  # type: ignore[index, union-attr, operator]
        head.out.weight[0, 0] = 1.0  # red = relu(256 · rel_y - 182)
    num_pixels = 4096
    y, x = torch.tensor([[3506]]), torch.tensor([[2048]])  # rel_y = 0.71216, in bf16 0.7109: 182.3 becomes 182
    rel = float(axis_at(y, num_pixels, 1).rel_lower)
    if half == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            red = decoder.query(torch.zeros(1, 8, 1, 1), (num_pixels, num_pixels), y, x)[0, 0]
    else:
        decoder = decoder.bfloat16()
        features = torch.zeros(1, 8, 1, 1, dtype=torch.bfloat16)
        red = decoder.query(features, (num_pixels, num_pixels), y, x)[0, 0]
    assert 0.3 < 256 * rel - 182 < 0.4
    assert float(red.detach()) == pytest.approx(256 * rel - 182, rel=2**-7)


def test_the_autoencoder_decodes_by_the_same_codes_in_half_precision() -> None:
    config = AutoencoderConfig(base_width=8, width_mult=(1,), num_res_blocks=1, norm_groups=4, num_embeddings=64)
    autoencoder = Autoencoder(config).eval().bfloat16()
    assert autoencoder.decode(torch.randn(1, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- DeepSpeed: a process group of one, and old checkpoints -----------------------------------------------------------


def in_deepspeed(folder: Path, stages: list[str]) -> None:
    """What the test below starts: the same module under some ZeRO stages; its averages after one step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    world = World(0, 1, 0, torch.device("cpu"))
    for zero_stage in map(int, stages):
        config = StageConfig(global_batch=4, precision="bf16", zero_stage=zero_stage)  # type: ignore[arg-type]
        engine: Engine = make_engine(Codes(), config, world, deepspeed=True)
        results = engine(latents())
        engine.backward(results[2] + results[3].square().mean())
        engine.step(1, 1e-3)
        kept = {str(i): tensor.detach().contiguous() for i, tensor in enumerate(results)}
        save_file({**kept, **(engine.averaged() or {})}, folder / f"{zero_stage}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[1], [0, 2, 3]])
def test_codes_under_deepspeed(stages: list[int], tmp_path: Path) -> None:
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(tmp_path), *map(str, stages)]
    done = subprocess.run(words, env={**os.environ, **here}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for zero_stage in stages:
        saved = load_file(tmp_path / f"{zero_stage}.safetensors")
        check((saved["0"], saved["1"], saved["2"], saved["3"]))
        averages = saved["quantizer.embedding.weight"]
        assert averages.dtype == torch.float32 and not torch.equal(averages, averages.bfloat16().float())


if __name__ == "__main__":
    in_deepspeed(Path(sys.argv[1]), sys.argv[2:])
