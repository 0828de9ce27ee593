"""Metrics against independent packages (scikit-image, SciPy, prdc, torchmetrics) on random and adversarial inputs."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from pipeline.errors import UserError
from pipeline.metrics import gaussian
from pipeline.metrics.bootstrap import (
    mean_interval,
    mean_resamples,
    paired_interval,
    resample_counts,
    spread_interval,
)
from pipeline.metrics.gaussian import FeatureStatistics, frechet_distance, frechet_resamples
from pipeline.metrics.kid import kid, kid_resamples, polynomial_mmd
from pipeline.metrics.manifold import kth_neighbour, manifold
from pipeline.metrics.psnr import psnr
from pipeline.metrics.speed import measure, wait_for
from pipeline.metrics.ssim import resize_pictures, self_ssim, self_ssim_pairs, ssim


def pictures(seed, shape=(2, 3, 24, 37)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def adversarial():
    black, white = torch.zeros(2, 3, 24, 37, dtype=torch.uint8), torch.full((2, 3, 24, 37), 255, dtype=torch.uint8)
    almost = black.clone()
    almost[:, 0, 0, 0] = 1
    return [(pictures(0), pictures(1)), (black, white), (black, almost), (pictures(2), 255 - pictures(2))]


def hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("case", range(4))
def test_psnr_and_ssim_equal_scikit_image(case):
    x, y = adversarial()[case]
    for i in range(2):
        expected = peak_signal_noise_ratio(hwc(x[i]), hwc(y[i]), data_range=255)
        assert float(psnr(x, y)[i]) == pytest.approx(expected, abs=1e-9)
        expected = structural_similarity(
            hwc(x[i]), hwc(y[i]), channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert float(ssim(x, y)[i]) == pytest.approx(expected, abs=1e-7)


def test_psnr_protocols():
    x, y = pictures(0), pictures(1)
    inside = np.s_[3:-3, 3:-3]
    luma = [(hwc(p) / 255.0 @ np.array([65.738, 129.057, 25.064]) / 256)[inside] for p in (x[0], y[0])]
    expected = -10 * np.log10(np.mean((luma[0] - luma[1]) ** 2))
    assert float(psnr(x, y, "benchmark", 2.5)[0]) == pytest.approx(expected, abs=1e-9)
    inside = np.s_[8:-8, 8:-8]
    expected = peak_signal_noise_ratio(hwc(x[0])[inside], hwc(y[0])[inside], data_range=255)
    assert float(psnr(x, y, "div2k", 2.0)[0]) == pytest.approx(expected, abs=1e-9)
    assert psnr(x, x).tolist() == [float("inf")] * 2
    with pytest.raises(UserError, match="leaves nothing"):
        psnr(x, y, "div2k", 8.0)
    with pytest.raises(UserError, match="uint8"):
        psnr(x.float(), y.float())
    with pytest.raises(UserError, match="cannot compare"):
        psnr(x, y[..., :-1])
    with pytest.raises(UserError, match="not known"):
        psnr(x, y, "other")


def test_self_ssim_is_one_for_a_picture_and_its_shrunken_self_and_symmetric():
    x = pictures(3, (2, 3, 40, 60))
    small = resize_pictures(x, (20, 30))
    assert self_ssim(x, small).tolist() == pytest.approx([1.0, 1.0])
    other = pictures(4, (2, 3, 20, 30))
    assert torch.equal(self_ssim(x, other), self_ssim(other, x)) and float(self_ssim(x, other).max()) < 0.5
    pairs = [(a, b) for a, b, _ in self_ssim_pairs({"a": x, "b": small, "c": other})]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


def features(seed, num, dim=12, kind="normal"):
    generator = np.random.default_rng(seed)
    if kind == "normal":
        return generator.normal(size=(num, dim)) @ generator.normal(size=(dim, dim)) + generator.normal(size=dim)
    if kind == "degenerate":  # rank one: most directions have no variance at all
        return generator.normal(size=(num, 1)) @ generator.normal(size=(1, dim))
    return np.round(generator.normal(size=(num, dim)))  # many ties


def scipy_fid(x, y):
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    d = x.mean(0) - y.mean(0)
    return d @ d + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)


@pytest.mark.parametrize("kind", ["normal", "degenerate", "ties"])
def test_fid_equals_the_matrix_square_root_and_merges(kind):
    x, y = features(0, 200, kind=kind), features(1, 150, kind=kind)
    whole = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    assert whole == pytest.approx(scipy_fid(x, y), rel=1e-5, abs=1e-5)
    statistics = [torch.from_numpy(v) for f in (x, y) for v in (f.mean(0), np.cov(f, rowvar=False))]
    assert whole == pytest.approx(float(_compute_fid(*statistics)), rel=1e-5, abs=1e-5)
    parts = FeatureStatistics.empty(12)
    for part in (x[:3], x[3:3], x[3:120], x[120:]):
        parts = parts.merge(FeatureStatistics.of(part))
    assert parts.num == 200 and np.allclose(parts.covariance(), np.cov(x, rowvar=False))
    assert frechet_distance(parts, FeatureStatistics.of(y)) == pytest.approx(whole, rel=1e-9, abs=1e-9)
    assert frechet_distance(parts, parts) == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 10))
def test_statistics_do_not_depend_on_how_samples_are_split(sizes, seed):
    x = features(seed, sum(sizes), dim=5)
    merged = FeatureStatistics.empty(5)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        merged = FeatureStatistics.of(part).merge(merged)
    whole = FeatureStatistics.of(x)
    assert merged.num == whole.num
    assert np.allclose(merged.mean, whole.mean) and np.allclose(merged.scatter, whole.scatter)


def test_too_few_samples_are_named_with_the_number_needed():
    few = FeatureStatistics.of(features(0, 12))
    with pytest.raises(UserError, match="12 features needs at least 13 samples .* got 12"):
        frechet_distance(few, few)
    with pytest.raises(UserError, match="needs at least 4 samples"):
        manifold(features(0, 3), features(1, 9))
    with pytest.raises(UserError, match="at least 2"):
        kid(features(0, 1), features(1, 9))
    with pytest.raises(UserError, match="not finite"):
        FeatureStatistics.of(np.array([[1.0, np.nan]]))


def test_kid_equals_the_sum_over_pairs():
    x, y = features(0, 9, 4), features(1, 7, 4)

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    within_x = np.mean([k(x[i], x[j]) for i in range(9) for j in range(9) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert polynomial_mmd(x, y) == pytest.approx(within_x + within_y - 2 * across)
    theirs = poly_mmd(torch.from_numpy(x[:7]), torch.from_numpy(y), degree=3, gamma=None, coef=1.0)
    assert polynomial_mmd(x[:7], y) == pytest.approx(float(theirs))
    mean, spread = kid(features(0, 400), features(0, 400)[::-1], num_subsets=30, subset_size=50)
    assert abs(mean) < 4 * spread  # the same distribution: zero on average
    assert kid(x, y, seed=3) == kid(x, y, seed=3)


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("block", [7, 2048])
def test_manifold_equals_prdc(kind, block):
    prdc = pytest.importorskip("prdc")
    x, y = features(0, 60, kind=kind), features(0, 60, kind=kind)[:45] + features(5, 45, kind=kind) * 0.6
    expected = prdc.compute_prdc(x, y, nearest_k=3)
    ours = manifold(x, y, k=3, block=block)
    for name, value in expected.items():
        assert getattr(ours, name) == pytest.approx(float(value)), name


def test_statistics_of_many_samples_are_taken_block_by_block(monkeypatch):
    monkeypatch.setattr(gaussian, "_BLOCK", 7)
    x = features(0, 61)
    statistics = FeatureStatistics.of(x.astype(np.float32))
    assert statistics.num == 61 and statistics.mean == pytest.approx(x.mean(axis=0), rel=1e-6)
    assert statistics.covariance() == pytest.approx(np.cov(x, rowvar=False), rel=1e-5, abs=1e-6)


def test_kth_neighbour_of_repeated_samples_is_zero():
    assert kth_neighbour(np.ones((6, 3)), 3).tolist() == [0.0] * 6


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = mean_interval(generator.normal(5.0, 2.0, size=60), num_resamples=300, seed=trial)
        hits += low <= 5.0 <= high
    assert 0.89 <= hits / 200 <= 0.99
    assert mean_interval(np.array([3.0])) == (3.0, 3.0)


def test_resamples_are_the_same_for_every_figure_of_the_same_samples():
    counts = resample_counts(5, num_resamples=400, seed=3)
    assert (
        counts.shape == (400, 5)
        and (counts.sum(axis=1) == 5).all()
        and counts.mean(axis=0) == pytest.approx(1, abs=0.2)
    )
    assert counts[0].tolist() == np.bincount(np.random.RandomState([3, 0, 5]).randint(0, 5, 5), minlength=5).tolist()
    values = np.array([1.0, 2.0, 3.0, 4.0, np.inf])
    plain, infinite = mean_resamples(values[:4], seed=1), mean_resamples(values, num_resamples=50)
    assert len(plain) == 1000 and plain.std() == pytest.approx(values[:4].std() / 2, rel=0.1)
    assert np.isinf(infinite).any() and np.isfinite(infinite).any()  # some resamples do not hold it


def test_a_paired_interval_does_not_hold_what_the_pictures_do():
    generator = np.random.default_rng(0)
    pictures = generator.normal(0.5, 0.2, size=400)
    one, other = pictures + generator.normal(0, 0.01, 400), pictures + 0.005
    low, high = paired_interval(one.mean(), other.mean(), mean_resamples(one), mean_resamples(other))
    difference = one - other
    expected = 1.96 * difference.std() / 20
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1) and (low + high) / 2 == pytest.approx(difference.mean())
    assert high < 0 and np.subtract(*mean_interval(one)) < -0.03  # alone, each moves ten times as far


def drawn(seed, num, dim=12):
    """Samples of one distribution."""
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / 4
    return np.random.default_rng(seed).normal(size=(num, dim)) @ mixing


def test_resamples_of_kid_spread_as_repeated_measurements_do():
    """Against the spread over fresh sets, and exactly against sums over pairs by hand."""
    fresh = [polynomial_mmd(drawn(2 * i, 60), drawn(2 * i + 1, 60) + 0.5) for i in range(200)]
    spreads = [np.std(kid_resamples(drawn(2 * i, 60), drawn(2 * i + 1, 60) + 0.5)) for i in range(10)]
    assert np.mean(spreads) == pytest.approx(np.std(fresh), rel=0.35)
    real, fake = drawn(0, 6), drawn(1, 5)
    first = kid_resamples(real, fake, num_resamples=3, seed=4)[0]
    rows = np.repeat(np.arange(6), resample_counts(6, num_resamples=3, seed=4, stream=1)[0])
    columns = np.repeat(np.arange(5), resample_counts(5, num_resamples=3, seed=4)[0])

    def kernel(x, y):
        return float(x @ y / len(x) + 1) ** 3

    within = [np.mean([kernel(s[i], s[j]) for i in drawn for j in drawn if i != j])
              for s, drawn in ((real, rows), (fake, columns))]  # fmt: skip
    across = np.mean([kernel(real[i], fake[j]) for i in rows for j in columns])
    assert first == pytest.approx(sum(within) - 2 * across)


def test_kid_of_many_samples_is_resampled_group_by_group(monkeypatch):
    real, fake = drawn(0, 300), drawn(1, 300) + 0.5
    whole = kid_resamples(real, fake)
    monkeypatch.setattr("pipeline.metrics.kid._GROUP", 100)
    grouped = kid_resamples(real, fake)
    assert np.corrcoef(whole, grouped)[0, 1] > 0.8 and grouped.std() == pytest.approx(whole.std(), rel=0.35)


def test_resamples_of_fid_spread_as_repeated_measurements_do():
    def measured(i, num):
        return drawn(2 * i, num), drawn(2 * i + 1, num) * 1.2 + 0.1

    def distance(real, fake):
        return frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(fake))

    fresh = [distance(*measured(i, 200)) for i in range(150)]
    found = [frechet_resamples(*measured(i, 200)) for i in range(8)]
    assert np.mean([r.std() for r in found]) == pytest.approx(np.std(fresh), rel=0.25)
    low, high = spread_interval(distance(*measured(0, 200)), found[0])
    assert low < distance(*measured(0, 200)) < high
    real, fake = measured(0, 200)  # the derivative itself: one sample weighs a little more
    counts = np.ones(200)
    counts[7] += 1e-4
    mean = counts @ fake / counts.sum()
    scatter = ((fake - mean) * counts[:, None]).T @ (fake - mean)
    num = len(fake)
    moved = FeatureStatistics(num, mean, scatter / counts.sum() * num)
    slope = (frechet_distance(FeatureStatistics.of(real), moved) - distance(real, fake)) / 1e-4 * num
    there, back = gaussian._transport(np.cov(real, rowvar=False), np.cov(fake, rowvar=False))
    difference = real.mean(axis=0) - fake.mean(axis=0)
    influence = gaussian._influence(fake, FeatureStatistics.of(fake), -2 * difference, back)
    assert influence[7] == pytest.approx(slope, rel=0.02)
    assert there @ np.cov(real, rowvar=False) @ there == pytest.approx(np.cov(fake, rowvar=False), rel=1e-6)


def test_peak_memory_sees_a_large_allocation():
    def run():
        torch.ones(64 << 20).sum()

    seconds, peak = measure(run, num=3)
    assert seconds > 0 and peak == pytest.approx(256 << 20, rel=0.1)


def test_only_cuda_is_waited_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    for device in ("cpu", torch.device("cpu"), "cuda:1", torch.device("cuda")):
        wait_for(device)
    assert asked == ["cuda:1", torch.device("cuda")]
