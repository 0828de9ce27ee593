"""The promotion rule as a pure function: two reports in, one decision out. No registry, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.common_options import did_you_mean
from pipeline.errors import UserError
from pipeline.metrics.bootstrap import paired_interval
from training.evaluation.spec import ONE_STEP

# Which figures a rule may weigh first (lower is better), by task; the first one that both reports have is used.
PRIMARY = {
    "sr": ("lpips", "lpips_random_vgg"),
    "reconstruction": ("lpips", "lpips_random_vgg"),
    "generation": ("fid", "kid", "fid_random_vgg", "kid_random_vgg", "fid_random_vgg64"),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Promote if the primary figure is lower beyond doubt at a majority of settings and higher beyond doubt at none,
    and the guard (dB) is nowhere worse by more than `guard_tolerance`. Beyond doubt: the 95 % interval of the
    difference on the same samples does not hold zero. The guard is every figure whose name begins so: PSNR by each
    protocol that was measured."""

    primary: str = "auto"
    guard: str = "psnr"
    guard_tolerance: float = 0.1

    def __post_init__(self) -> None:
        """`UserError` for a primary figure of which lower is not better, or of which nothing is known."""
        known = sorted({name for names in PRIMARY.values() for name in names})
        if self.primary not in ("auto", *known):
            near = did_you_mean(self.primary, ["auto", *known])
            raise UserError(
                f"no rule weighs {self.primary!r} first{near}; --primary is auto or one of {', '.join(known)}"
            )

    def text(self) -> str:
        return (
            f"{self.primary} lower by the 95 % interval of the paired difference at most settings and higher at none; "
            f"{self.guard} nowhere worse by more than {self.guard_tolerance:g} dB"
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """promote: whether the alias moves. reasons: one line per comparison, in words."""

    promote: bool
    rule: str
    reasons: tuple[str, ...]

    def text(self) -> str:
        """The rule, the reasons and the outcome, a line each."""
        lines = [f"rule: {self.rule}", *(f"  {reason}" for reason in self.reasons)]
        return "\n".join([*lines, "promoted" if self.promote else "not promoted"])

    def summary(self) -> str:
        return ("promoted: " if self.promote else "not promoted: ") + "; ".join(self.reasons)


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    setting: str
    verdict: str  # "better", "worse" or "undecided"
    line: str


def decide(champion: Mapping[str, Any] | None, candidate: Mapping[str, Any], rule: Rule | None = None) -> Decision:
    """Compare two reports (`Report.to_dict()`). With no champion the candidate is promoted.

    Raises `UserError` naming the difference when the figures are not comparable: another task, data set, split, way to
    make pairs, protocol, number of samples or seed, or no figure in common.
    """
    rule = rule or Rule()
    check_finite(candidate)
    if champion is None:
        return Decision(promote=True, rule="first model", reasons=("there is no champion yet",))
    check_comparable(champion, candidate)
    primary = _primary(champion, candidate, rule)
    comparisons = _compare(champion, candidate, primary)
    guard = _guard(champion, candidate, rule)
    wins = sum(c.verdict == "better" for c in comparisons)
    losses = [c for c in comparisons if c.verdict == "worse"]
    promote = 2 * wins > len(comparisons) and not losses and all(ok for ok, _ in guard)
    text = Rule(primary=primary, guard=rule.guard, guard_tolerance=rule.guard_tolerance).text()
    return Decision(promote=promote, rule=text, reasons=tuple([c.line for c in comparisons] + [s for _, s in guard]))


def check_comparable(champion: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """Refuse reports that do not measure the same thing on the same data."""
    for key, words in (
        ("task", "task"),
        ("data_digest", "data set digest"),
        ("split", "split"),
        ("sr_mode", "way to make pairs (sr_mode)"),
        ("protocol_version", "protocol version"),
        ("num", "number of samples"),
        ("seed", "seed"),
        ("sampler", "sampler settings"),
    ):
        left, right = champion.get(key), candidate.get(key)
        if key == "sampler" and ONE_STEP in (left, right):
            continue  # a distilled model samples in its own way, and is weighed so
        if left != right:
            raise UserError(
                f"the figures are not comparable: {words} is {left!r} for the champion and {right!r} for the "
                "candidate; evaluate both with the same --data and options"
            )
    inputs = [report.get("lr_size") for report in (champion, candidate)]
    if candidate.get("sr_mode") == "fixed-input" and None not in inputs and inputs[0] != inputs[1]:
        raise UserError(
            f"the figures are not comparable: the champion enlarges inputs of {inputs[0]} pixels and the candidate of "
            f"{inputs[1]}, so each scale has another truth; evaluate both with --sr-mode fixed-truth, or register the "
            "candidate under another name"
        )
    if not all(_has_resamples(report) for report in (champion, candidate)):
        raise UserError("the figures are not comparable: a report has no resamples to pair; evaluate both again")
    if not candidate.get("data_digest"):
        raise UserError("the figures are not comparable: the reports name no data set digest; evaluate both again")
    ours, theirs = _by_key(candidate), _by_key(champion)
    deciding = PRIMARY.get(str(candidate.get("task")), ())
    names, others = ({name for name, _ in keys} & set(deciding) for keys in (ours, theirs))
    if names and others and not names & others:  # measured with and without real weights
        raise UserError(
            f"the figures are not comparable: the champion has {', '.join(sorted(others))} and the candidate "
            f"{', '.join(sorted(names))}"
        )
    for figure in sorted(set(ours) & set(theirs)):
        left, right = theirs[figure]["protocol"], ours[figure]["protocol"]
        if left != right:
            raise UserError(
                f"the figures are not comparable: protocol of {'/'.join(figure)} is {left!r} for the champion and "
                f"{right!r} for the candidate"
            )


def _has_resamples(report: Mapping[str, Any]) -> bool:
    """Whether the figures that may decide have resamples."""
    deciding = PRIMARY.get(str(report.get("task")), ())
    return all(figure.get("resamples") for (name, _), figure in _by_key(report).items() if name in deciding)


def check_finite(report: Mapping[str, Any]) -> None:
    for key, figure in _by_key(report).items():
        if figure["value"] is None or math.isnan(float(figure["value"])):
            raise UserError(f"{'/'.join(key)} of the candidate is not a number; nothing is promoted on it")


def _by_key(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(f["name"], f["setting"]): f for f in report.get("figures", []) if f["method"] == "ours"}


def _primary(champion: Mapping[str, Any], candidate: Mapping[str, Any], rule: Rule) -> str:
    names = {name for name, _ in _by_key(champion)} & {name for name, _ in _by_key(candidate)}
    wanted = PRIMARY.get(str(candidate["task"]), ()) if rule.primary == "auto" else (rule.primary,)
    for name in wanted:
        if name in names:
            return name
    raise UserError(f"the figures are not comparable: both reports need one of {', '.join(wanted)}")


def _compare(champion: Mapping[str, Any], candidate: Mapping[str, Any], name: str) -> list[_Comparison]:
    theirs, ours = _by_key(champion), _by_key(candidate)
    settings = [s for n, s in ours if n == name]
    if {s for n, s in theirs if n == name} != set(settings):
        raise UserError(f"the figures are not comparable: {name} was measured at other sizes or scales")
    return [_compare_one(name, setting, theirs[name, setting], ours[name, setting]) for setting in settings]


def _compare_one(name: str, setting: str, champion: Mapping[str, Any], candidate: Mapping[str, Any]) -> _Comparison:
    for figure, who in ((champion, "champion"), (candidate, "candidate")):
        if not figure.get("resamples"):
            raise UserError(f"{name} at {setting} of the {who} has no resamples; a rule cannot weigh it")
    if len(champion["resamples"]) != len(candidate["resamples"]) or champion["num"] != candidate["num"]:
        raise UserError(f"the figures are not comparable: {name} at {setting} has other resamples; evaluate both anew")
    if candidate["num"] < 2:
        raise UserError(f"{name} at {setting} was measured on one sample, which decides nothing; evaluate more")
    low, high = paired_interval(candidate["value"], champion["value"], candidate["resamples"], champion["resamples"])
    verdict = "better" if high < 0 else "worse" if low > 0 else "undecided"
    line = (
        f"{name} at {setting}: {candidate['value']:.4g} against {champion['value']:.4g}, a difference of "
        f"{candidate['value'] - champion['value']:.2g} [{low:.2g}, {high:.2g}], is {verdict}"
    )
    return _Comparison(setting=setting, verdict=verdict, line=line)


def _guard(champion: Mapping[str, Any], candidate: Mapping[str, Any], rule: Rule) -> list[tuple[bool, str]]:
    theirs, ours = _by_key(champion), _by_key(candidate)
    keys = sorted(key for key in ours.keys() | theirs.keys() if key[0].startswith(rule.guard))
    if not keys and candidate["task"] != "generation":  # of a generated picture there is no truth
        raise UserError(f"the figures are not comparable: neither report has {rule.guard}, which the rule guards")
    results = []
    for key in keys:
        name = f"{key[0]} at {key[1]}"
        if key not in ours or key not in theirs:
            lacking = "candidate" if key not in ours else "champion"
            raise UserError(f"the figures are not comparable: the {lacking} has no {name}")
        new, old = ours[key]["value"], theirs[key]["value"]
        if new < old - rule.guard_tolerance:
            results.append((False, f"{name}: {new:.2f} dB is worse than {old:.2f} dB"))
        else:
            results.append((True, f"{name}: {new:.2f} dB against {old:.2f} dB is allowed"))
    return results
