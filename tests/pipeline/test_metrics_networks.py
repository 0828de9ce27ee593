"""Feature networks: pinned values, loading from checked files only, stand-ins."""

import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from pipeline.errors import UserError
from pipeline.metrics import weights
from pipeline.metrics.backbones import AlexNet, RandomVgg, Vgg16, init_random
from pipeline.metrics.inception import Inception2015, resize_like_tensorflow1
from pipeline.metrics.lpips import Lpips, random_lpips


def pictures(seed=0, shape=(2, 3, 40, 56)):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def known(path, form="state_dict"):
    return (weights.WeightFile(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), form),)


@pytest.fixture(scope="module")
def inception():
    """Seeded weights: with these, this network and torch-fidelity's gave bit-equal features on three picture sizes."""
    model = Inception2015().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
    return model


def test_inception_has_the_published_shape_and_pinned_features(inception):
    features = inception(pictures())
    assert features.shape == (2, 2048) and sum(p.numel() for p in inception.parameters()) == 23_850_960
    names = set(inception.state_dict())
    for name in (
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch5x5_2.bn.running_var",
        "Mixed_6e.branch7x7dbl_5.conv.weight",
        "Mixed_7a.branch7x7x3_4.bn.bias",
        "Mixed_7c.branch3x3dbl_3b.conv.weight",
        "fc.weight",
    ):
        assert name in names
    measured = [float(features.mean()), float(features.std()), float(features[1, 7])]
    assert measured == pytest.approx(PINNED, rel=1e-4)


PINNED = [0.5470781326293945, 0.7408332824707031, 0.0]


def test_resize_samples_where_tensorflow_1_does():
    x = torch.arange(8.0).view(1, 1, 2, 4)
    # 4 → 8 columns: positions 0, 0.5, ..., 3.5, the last clamped to the border; rows repeat.
    row = resize_like_tensorflow1(x, 8)[0, 0, 0]
    assert row.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_both_inception_files_load(inception, tmp_path):
    state, script = tmp_path / "inception.pth", tmp_path / "inception.pt"
    torch.save(inception.state_dict(), state)
    loaded = weights.load_inception(str(state), known(state))
    assert torch.equal(loaded(pictures()), inception(pictures()))

    class Scripted(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return images.float().mean(dim=(2, 3)) if return_features else images.float()

    torch.jit.script(Scripted()).save(str(script))
    loaded = weights.load_inception(str(script), known(script, "torchscript"))
    assert torch.equal(loaded(pictures()), pictures().float().mean(dim=(2, 3)))


def test_a_file_with_another_checksum_is_refused_before_it_is_parsed(tmp_path):
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    file.write_bytes(b"anything")
    with pytest.raises(UserError, match="SHA-256 .* is not that of"):
        weights.load_inception(str(file))
    with pytest.raises(UserError, match="no such file"):
        weights.load_vgg16(str(tmp_path / "none.pth"))


def test_pickles_that_run_code_are_refused(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    for data in (pickle.dumps(Evil()), _torch_saved({"features.0.weight": Evil()})):
        with pytest.raises(UserError, match="not a plain state dict"):
            weights.parse_state_dict(data, "evil.pth")
    with pytest.raises(UserError, match="more than tensors"):
        weights.parse_state_dict(_torch_saved({"epoch": 3}), "checkpoint.pth")
    assert not marker.exists()


def _torch_saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_urls_and_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTZOOM_WEIGHTS", str(tmp_path / "cache"))
    data = save_safetensors({"a": torch.ones(2)})
    file = tmp_path / "w.safetensors"
    file.write_bytes(data)
    import fsspec

    with fsspec.open("memory://w.safetensors", "wb") as remote:
        remote.write(data)
    assert weights.read_weights("memory://w.safetensors", known(file))[0] == data
    fsspec.filesystem("memory").rm("/w.safetensors")
    assert weights.read_weights("memory://w.safetensors", known(file))[0] == data  # from the cache
    assert weights.read_weights("w.safetensors", known(file))[0] == data
    assert torch.equal(weights.parse_state_dict(data, "w")["a"], torch.ones(2))


def test_lpips_from_torchvision_named_files_and_installed_heads(tmp_path):
    base = AlexNet()
    init_random(base, 1)
    state = dict(base.state_dict()) | {"classifier.1.weight": torch.zeros(4, 4)}
    heads = {f"lin{i}.model.1.weight": torch.full((1, c, 1, 1), 0.5) for i, c in enumerate((64, 192, 384, 256, 256))}
    torch.save(state, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "heads.pth")
    model = weights.load_lpips(
        str(tmp_path / "alexnet.pth"), str(tmp_path / "heads.pth"), known(tmp_path / "alexnet.pth"),
        known(tmp_path / "heads.pth"),
    )  # fmt: skip
    assert torch.equal(model.features[0].weight, base.features[0].weight)
    distance = model(pictures(0), pictures(1))
    assert distance.shape == (2,) and float(distance.min()) > 0
    assert model(pictures(0), pictures(0)).tolist() == [0.0, 0.0]
    assert torch.allclose(distance, model(pictures(1), pictures(0)))


def test_lpips_by_hand_on_one_layer():
    model = random_lpips()
    images = pictures(0, (1, 3, 32, 32)), pictures(1, (1, 3, 32, 32))
    expected = 0.0
    maps = [model._prepare(i) for i in images]
    for index, layer in enumerate(model.features):
        maps = [layer(m) for m in maps]
        if index in model.taps:
            x, y = (m.numpy()[0].reshape(m.shape[1], -1).astype(np.float64) for m in maps)
            x, y = (v / (np.linalg.norm(v, axis=0) + 1e-10) for v in (x, y))
            expected += ((x - y) ** 2).sum(axis=0).mean()
    assert float(model(*images)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="at least 32"):
        model(pictures(0, (1, 3, 31, 40)), pictures(1, (1, 3, 31, 40)))


def test_installed_heads_are_the_published_ones():
    pytest.importorskip("torchmetrics")
    data, file = weights.read_weights(weights.installed_heads(), (weights.ALEXNET_HEADS,))
    assert file is weights.ALEXNET_HEADS
    assert sorted(weights.parse_state_dict(data, "heads")) == [f"lin{i}.model.1.weight" for i in range(5)]


def test_vgg16_names_are_torchvisions_and_forward_is_fc2():
    model = Vgg16(with_classifier=False)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.endswith("weight")}
    assert shapes["features.0.weight"] == (64, 3, 3, 3) and shapes["features.28.weight"] == (512, 512, 3, 3)
    assert len(shapes) == 13


def test_the_stand_in_is_the_same_network_every_time():
    one, two = RandomVgg(), RandomVgg()
    features = one(pictures())
    assert features.shape == (2, 64) and torch.equal(features, two(pictures()))
    assert not torch.equal(features, RandomVgg(seed=1)(pictures()))
    assert isinstance(random_lpips(), Lpips)
