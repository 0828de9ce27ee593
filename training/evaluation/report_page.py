"""A report as Markdown and as one HTML file: tables laid out like the paper's, ours first, then what was published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from training.evaluation import published
from training.evaluation.report import Figure, Report

_LOWER = ("fid", "kid", "lpips")
_UNITS = {"psnr_rgb": "PSNR", "psnr_benchmark": "PSNR (Y)", "psnr_div2k": "PSNR (DIV2K)", "ssim": "SSIM"}
_PAIRS = {
    "fixed-input": "each picture's centre square, as input of the model's size and as truth of input × scale",
    "fixed-truth": "each picture is the truth, shrunk by the scale to make the input",
}
Table = tuple[list[str], list[list[str]]]


def tables(report: Report) -> list[tuple[str, Table]]:
    """(title, (header, rows)) of everything that was measured."""
    found = [("Figures", _main_table(report))]
    if any(f.name == "selfssim" for f in report.figures):
        found.append(("SelfSSIM: one latent at two sizes", _selfssim_table(report)))
    if any(f.name == "fps" for f in report.figures):
        found.append(("Speed", _speed_table(report)))
    return found


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown; `pictures` are file names beside it."""
    lines = [f"# Evaluation of {report.model_name or report.model}: {report.task}", "", _summary(report), ""]
    for title, (header, rows) in tables(report):
        lines += [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += ["  \n".join(_captions(report)), ""]
    if report.notes:
        lines += ["## Notes", "", *[f"- {note}" for note in report.notes], ""]
    lines += ["## Protocols", "", *[f"- `{name}`: {text}" for name, text in _protocols(report)], ""]
    lines += [f"![{name}]({name})" for name in pictures]
    lines += ["", "## Provenance", "", *[f"- {key}: `{value}`" for key, value in _provenance(report)], ""]
    return "\n".join(lines)


def page(report: Report, pictures: Sequence[str] = ()) -> str:
    """The report as one HTML file without scripts or outside resources: `report_page.html`, filled in by Jinja."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("report_page.html").render(
        report=report,
        summary=_summary(report),
        tables=tables(report),
        captions=_captions(report),
        pictures=pictures,
        protocols=_protocols(report),
        provenance=_provenance(report),
    )


def _main_table(report: Report) -> Table:
    figures = [f for f in report.figures if f.name not in ("selfssim", "fps", "peak_memory_mb")]
    names = list(dict.fromkeys(f.name for f in figures))
    settings = list(dict.fromkeys(f.setting for f in figures))
    header = ["method"] + [f"{_label(n)} {s}" for s in settings for n in names]
    rows = []
    for method in dict.fromkeys(f.method for f in figures):
        cells = [_cell(report.get(n, s, method)) for s in settings for n in names]
        rows.append([f"**{method}**" if method == "ours" else method, *cells])
    for table in _published(report):
        for method, by_setting in table.rows.items():
            values = [by_setting.get(s, {}).get(n) for s in settings for n in names]
            if any(v is not None for v in values):
                rows.append([f"{method} (published)", *["–" if v is None else f"{v:.4g}" for v in values]])
    return header, rows


def _published(report: Report) -> list[published.Published]:
    """Tables with a figure at a setting that was measured here too."""
    measured = {(f.setting, f.name) for f in report.figures}
    return [
        table
        for table in published.beside(report.dataset, report.task, report.sr_mode, report.lr_size)
        if any((s, n) in measured for row in table.rows.values() for s, values in row.items() for n in values)
    ]


def _published_speed(report: Report) -> dict[str, dict[str, float]]:
    return published.speed_beside(report.dataset, report.task, report.sr_mode, report.lr_size)


def _captions(report: Report) -> list[str]:
    has_speed = any(f.name == "fps" for f in report.figures) and bool(_published_speed(report))
    return [table.caption for table in _published(report)] + ([published.SPEED_CAPTION] if has_speed else [])


def _selfssim_table(report: Report) -> Table:
    pairs = [f for f in report.figures if f.name == "selfssim"]
    sizes = list(dict.fromkeys(s for f in pairs for s in f.setting.split("-")))
    found = {frozenset(f.setting.split("-")): f.value for f in pairs}
    rows = []
    for one in sizes:
        cells = ["1.000" if one == two else f"{found[frozenset((one, two))]:.3f}" for two in sizes]
        rows.append([f"**{one}**", *cells])
    theirs = published.BEDROOM_SELFSSIM if report.dataset == "lsun-bedroom" else {}
    rows += [[f"{m} (published, across sizes)", v] + [""] * (len(sizes) - 1) for m, v in theirs.items()]
    return ["ours", *sizes], rows


def _speed_table(report: Report) -> Table:
    others = _published_speed(report)
    rows = []
    for f in [f for f in report.figures if f.name == "fps"]:
        memory = report.get("peak_memory_mb", f.setting)
        theirs = [f"{by_scale[f.setting]:.4g}" if f.setting in by_scale else "–" for by_scale in others.values()]
        rows.append([f.setting, f"{f.value:.4g}", f"{memory.value:.0f}" if memory else "–", *theirs])
    return ["scale", "pictures a second", "peak memory, MB", *[f"{name} (published)" for name in others]], rows


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    digits = ".2f" if figure.name.startswith("psnr") else ".4f"
    text = f"{figure.value:{digits}}"
    if figure.method == "ours" and figure.low is not None and figure.high is not None:
        text += f" [{figure.low:{digits}}, {figure.high:{digits}}]"
    return text


def _label(name: str) -> str:
    return _UNITS.get(name, name) + (" ↓" if name.startswith(_LOWER) else " ↑")


def _summary(report: Report) -> str:
    split = f" (split {report.split})" if report.split else ""
    pairs = f" Pairs: {_PAIRS[report.sr_mode]}." if report.sr_mode in _PAIRS else ""
    return (
        f"{report.num} samples of {report.data}{split}, seed {report.seed}, {report.sampler}.{pairs} "
        "Brackets are 95 % bootstrap intervals."
    )


def _protocols(report: Report) -> list[tuple[str, str]]:
    return list(dict.fromkeys((f.name, f.protocol) for f in report.figures))


def _provenance(report: Report) -> list[tuple[str, str]]:
    return [
        ("model", report.model),
        ("bundle SHA-256 (config.json)", report.bundle_digest),
        ("encoder", report.encoder_identity),
        ("data", report.data),
        ("data digest", report.data_digest),
        ("protocol version", str(report.protocol_version)),
        ("versions", json.dumps(report.versions)),
        ("seconds", f"{report.seconds:g}"),
    ]
