"""A report on disk and in MLflow: report.json, report.md, report.html, plots and strips."""

from __future__ import annotations

import tempfile
from pathlib import Path

from orchestration.tracking import store as tracking
from pipeline import storage
from training.evaluation.chunk import Arrays
from training.evaluation.report import Report
from training.evaluation.report_page import markdown, page
from training.evaluation.report_pictures import plots, strips


def write_report(report: Report, pictures: Arrays, out: str) -> list[str]:
    """Write all files under `out` (any fsspec URL), report.json last; returns their names."""
    files = plots(report) | strips(pictures)
    names = list(files)
    files |= {"report.md": markdown(report, names).encode(), "report.html": page(report, names).encode()}
    for name, content in files.items():
        storage.write_bytes(storage.join(out, name), content)
    storage.write_json(storage.join(out, "report.json"), report.to_json())
    return [*files, "report.json"]


def log_report(report: Report, names: list[str], out: str, run_id: str, *, tracking_uri: str | None = None) -> None:
    """Log figures (linked to the data set) and the files of a report to an MLflow run. names: what `write_report` wrote
    under `out`, where other files may lie."""
    uri = tracking.tracking_uri(tracking_uri)
    data = report.data.rstrip("/").rsplit("/", 1)[-1]
    tracking.log_dataset(uri, run_id, report.data, report.data_digest, name=data, context="evaluation")
    link = (data, tracking.short_digest(report.data_digest))
    with tracking.user_errors(uri):
        tracking.log_metrics(uri, run_id, report.metrics(), dataset=link)
        with tempfile.TemporaryDirectory(prefix="latentzoom-report-") as folder:
            for name in names:
                local = Path(folder) / name
                local.write_bytes(storage.read_bytes(storage.join(out, name)))
                tracking.client(uri).log_artifact(run_id, str(local), "evaluation")
