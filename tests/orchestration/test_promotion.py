"""The promotion rule as a pure function: what moves the alias, what does not, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.registry.promotion import Rule, decide
from pipeline.errors import UserError
from training.evaluation.spec import ONE_STEP


def figure(name, setting, value, half=0.01, **changes):
    interval = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
    base = {"name": name, "method": "ours", "setting": setting, "value": value, "protocol": "p", "num": 9}
    base["resamples"] = () if half is None else resamples(value, half, seed=abs(hash(value)) % 2**32)
    return base | interval | changes


def resamples(value, half, seed):
    """As of a figure with an interval of value ± half; those of another seed are of other pictures."""
    return tuple(value + half / 1.96 * np.random.default_rng(seed).normal(size=200))


def report(lpips, psnr=(25.0, 24.0), half=0.01, **changes):
    figures = [figure("lpips", f"x{i}", v, half) for i, v in enumerate(lpips)]
    figures += [figure("psnr_rgb", f"x{i}", v, 0.2) for i, v in enumerate(psnr)]
    base = {"task": "sr", "data_digest": "d", "protocol_version": 1, "num": 9, "seed": 0, "sampler": "s"}
    base |= {"split": "val", "sr_mode": "fixed-input"}
    return base | {"figures": figures} | changes


def test_the_first_model_is_promoted():
    assert decide(None, report((0.5,))).promote


@pytest.mark.parametrize(
    ("champion", "candidate", "expected"),
    [
        (report((0.5, 0.6)), report((0.4, 0.5)), True),
        (report((0.5, 0.6)), report((0.495, 0.595)), False),  # the difference may be chance
        (report((0.5, 0.6)), report((0.5, 0.6)), False),  # the same model
        (report((0.5, 0.6)), report((0.4, 0.7)), False),  # worse at one scale
        (report((0.5, 0.6, 0.7)), report((0.4, 0.5, 0.7)), True),  # two of three better, none worse
        (report((0.5, 0.6)), report((0.4, 0.6)), False),  # one of two is no majority
        (report((0.5, 0.6)), report((0.4, 0.5), psnr=(24.95, 24.0)), True),  # 0.05 dB is allowed
        (report((0.5, 0.6)), report((0.4, 0.5), psnr=(24.85, 24.0)), False),  # 0.15 dB is not
        (report((0.5, 0.6)), report((0.4, 0.5), psnr=(30.0, 23.0)), False),  # a gain elsewhere makes up for nothing
    ],
)
def test_the_rule(champion, candidate, expected):
    assert decide(champion, candidate).promote is expected


def test_models_are_weighed_on_the_same_pictures():
    """Figures whose own intervals overlap: what the pictures do to both is not what tells the models apart."""

    def measured(value, seed):
        return report((value, value)) | {
            "figures": [figure("lpips", s, value, 0.05, resamples=resamples(value, 0.05, seed)) for s in ("x2", "x4")]
            + [figure("psnr_rgb", "x2", 25.0, 0.2)]
        }

    assert decide(measured(0.50, seed=0), measured(0.49, seed=0)).promote
    assert not decide(measured(0.49, seed=0), measured(0.50, seed=0)).promote
    assert not decide(measured(0.50, seed=0), measured(0.49, seed=1)).promote  # other pictures: it may be chance
    assert "a difference of -0.01 [-0.01, -0.01], is better" in decide(measured(0.5, 0), measured(0.49, 0)).reasons[0]


def test_one_sample_and_other_resamples_decide_nothing():
    one = [figure("lpips", "x0", value, num=1) for value in (0.5, 0.1)]
    with pytest.raises(UserError, match="measured on one sample"):
        decide(report(()) | {"figures": [one[0], figure("psnr", "x0", 25.0)]},
               report(()) | {"figures": [one[1], figure("psnr", "x0", 25.0)]})  # fmt: skip
    fewer = figure("lpips", "x0", 0.1, resamples=(0.1, 0.2))
    with pytest.raises(UserError, match="other resamples"):
        decide(report((0.5,)), report(()) | {"figures": [fewer, figure("psnr_rgb", "x0", 25.0)]})


def test_models_of_other_input_sizes_are_not_weighed_where_the_truth_follows_the_input():
    ours, theirs = report((0.4, 0.5), lr_size=8), report((0.5, 0.6), lr_size=16)
    with pytest.raises(UserError, match="champion enlarges inputs of 16 pixels and the candidate of 8"):
        decide(theirs, ours)
    assert decide(theirs | {"sr_mode": "fixed-truth"}, ours | {"sr_mode": "fixed-truth"}).promote
    assert decide(report((0.5, 0.6)), ours).promote  # a report from before the size was in it


@pytest.mark.parametrize("name", ["ssim", "psnr_rgb", "fps", "precision", "nonsense"])
def test_a_figure_of_which_lower_is_not_better_is_no_primary_one(name):
    with pytest.raises(UserError, match=f"no rule weighs '{name}' first; --primary is auto or one of fid, "):
        Rule(primary=name)


def test_the_tolerance_is_a_parameter():
    candidate = report((0.4, 0.5), psnr=(24.5, 24.0))
    assert decide(report((0.5, 0.6)), candidate, Rule(guard_tolerance=1.0)).promote
    assert not decide(report((0.5, 0.6)), candidate).promote


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "generation"}, "task"),
        ({"data_digest": "e"}, "data set digest"),
        ({"protocol_version": 2}, "protocol version"),
        ({"num": 8}, "number of samples"),
        ({"seed": 1}, "seed"),
        ({"sampler": "t"}, "sampler"),
        ({"split": "train"}, "split"),
        ({"sr_mode": "fixed-truth"}, "way to make pairs"),
    ],
)
def test_figures_that_do_not_compare_are_refused(changes, words):
    with pytest.raises(UserError, match=f"not comparable: {words}"):
        decide(report((0.5,)), report((0.1,), **changes))


def test_other_protocols_settings_and_names_are_refused():
    base = report((0.5,), psnr=(25.0,))
    guard = base["figures"][-1]
    with pytest.raises(UserError, match="protocol of lpips/x0"):
        decide(base, base | {"figures": [figure("lpips", "x0", 0.1, protocol="q"), guard]})
    with pytest.raises(UserError, match="other sizes or scales"):
        decide(base, base | {"figures": [figure("lpips", "x9", 0.1), guard]})
    with pytest.raises(UserError, match="the champion has lpips and the candidate"):
        decide(base, base | {"figures": [figure("lpips_random_vgg", "x0", 0.1), guard]})
    with pytest.raises(UserError, match="no resamples to pair"):
        decide(base, base | {"figures": [figure("lpips", "x0", 0.1, half=None), guard]})
    with pytest.raises(UserError, match="no data set digest"):
        decide(base | {"data_digest": ""}, base | {"data_digest": ""})


@pytest.mark.parametrize("name", ["psnr_rgb", "psnr_div2k", "psnr_benchmark"])
def test_psnr_by_any_protocol_guards(name):
    def measured(lpips, psnr):
        return report((lpips,), psnr=()) | {"figures": [figure("lpips", "x4", lpips), figure(name, "x4", psnr, 0.2)]}

    assert decide(measured(0.5, 25.0), measured(0.1, 25.0)).promote
    assert not decide(measured(0.5, 25.0), measured(0.1, 10.0)).promote
    with pytest.raises(UserError, match=f"the candidate has no {name} at x4"):
        decide(measured(0.5, 25.0), report((), psnr=()) | {"figures": [figure("lpips", "x4", 0.1)]})
    with pytest.raises(UserError, match="neither report has psnr"):
        decide(report((0.5,), psnr=()), report((0.1,), psnr=()))


def test_generated_pictures_have_no_truth_and_need_no_guard():
    def measured(fid):
        return report((), psnr=()) | {"task": "generation", "figures": [figure("fid", "128x128", fid, 0.1)]}

    assert decide(measured(9.0), measured(7.0)).promote


def test_a_figure_that_is_not_a_number_never_promotes():
    with pytest.raises(UserError, match="not a number"):
        decide(None, report((float("nan"),)))


def test_baselines_do_not_count():
    candidate = report((0.5, 0.6))
    candidate["figures"] += [figure("lpips", "x0", 0.0, method="bicubic"), figure("lpips", "x1", 0.0, method="bicubic")]
    assert not decide(report((0.5, 0.6)), candidate).promote


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_two_models_never_both_beat_each_other(first, second):
    one, two = report(tuple(first)), report(tuple(second[: len(first)]))
    assert not (decide(one, two).promote and decide(two, one).promote)


def test_a_distilled_candidate_is_weighed_against_a_champion_that_takes_many_steps():
    student = report((0.4, 0.5), sampler=ONE_STEP)
    assert decide(report((0.5, 0.6)), student).promote
    assert not decide(report((0.3, 0.4)), student).promote
    with pytest.raises(UserError, match="sampler settings"):
        decide(report((0.5, 0.6)), report((0.4, 0.5), sampler="dpm++, 9 steps, eta 0"))
