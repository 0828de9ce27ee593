"""The model card of a registered version: what it is, what it was trained on, its figures, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.bundle import Bundle
from pipeline.card import model_card as pipeline_card
from pipeline.card import started_from


def model_card(
    name: str,
    bundle: Bundle,
    report: Mapping[str, Any] | None,
    dataset: tuple[str, str] | None,
    tags: Mapping[str, str],
) -> str:
    """Markdown. The bundle's own card (training, licence, use) comes first, then what the registry knows."""
    card = bundle.card.strip() or pipeline_card(bundle.config, bundle.meta).strip()
    lines = [card, "", "## Figures of this version", "", *_figures(report), "", "## Data", ""]
    lines += [f"{dataset[0]}, manifest SHA-256 `{dataset[1]}`." if dataset else "Not recorded.", ""]
    lines += [
        "## Use from the registry",
        "",
        "```",
        *(
            [f"latentzoom generate --model models:/{name}@champion --size 700x1000 --num 4 --seed 0"]
            if bundle.config.task == "generation"
            else []
        ),
        f"latentzoom upscale --model models:/{name}@champion --scale 5.3 IN OUT",
        "```",
        "",
        "## Provenance",
        "",
        *[f"- {label}: `{tags[key]}`" for label, key in _PROVENANCE if tags.get(key)],
    ]
    return "\n".join(lines) + "\n"


def stage_line(stage: str, facts: Any) -> str:
    """One stage in words: "decoder: 900 steps on data 053bc4825ce4"."""
    if not isinstance(facts, Mapping):
        return f"{stage}: {facts}"
    return f"{stage}: {facts.get('steps', '?')} steps on data {str(facts.get('data', '?'))[:12]}{started_from(facts)}"


_PROVENANCE = (
    ("code", "latentzoom.git_commit"),
    ("lock file SHA-256", "latentzoom.lock_sha256"),
    ("encoder SHA-256", "latentzoom.encoder_identity"),
    ("bundle SHA-256", "latentzoom.bundle_digest"),
)


def _figures(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return ["None were given at registration."]
    digest = str(report["data_digest"])[:12]
    lines = [
        f"{report['num']} samples of {report['data']}, digest {digest}, seed {report['seed']}.",
        "",
        "| figure | setting | method | value | 95 % interval | protocol |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for f in report["figures"]:
        interval = "" if f["low"] is None else f"{float(f['low']):.4g} to {float(f['high']):.4g}"
        lines.append(
            f"| {f['name']} | {f['setting']} | {f['method']} | {float(f['value']):.4g} | {interval} | {f['protocol']} |"
        )
    return lines + ["", *[f"Note: {note}" for note in report.get("notes", ())]]
