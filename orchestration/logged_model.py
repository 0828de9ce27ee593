"""A bundle as an MLflow LoggedModel: safetensors, JSON, models-from-code file, signature, example, pinned versions."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestration import tracking
from pipeline import storage
from pipeline.bundle import Bundle

BUNDLE_PATH = "artifacts/bundle"
"""Where the bundle lies inside the logged model."""
REPORT_PATH = "evaluation/report.json"
"""Where its evaluation report lies there: it outlives the run."""
_REQUIREMENTS = ("mlflow", "torch", "diffusers", "safetensors", "numpy", "pillow", "pandas", "fsspec")


def log_model(
    uri: str,
    run_id: str,
    folder: Path,
    bundle: Bundle,
    *,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
) -> str:
    """Log the bundle in `folder` as one LoggedModel of run `run_id`; returns the model id. READY only when complete.

    Not by `mlflow.pyfunc.log_model`: that writes to the process's global store and active run, and the model would be
    READY before its report lies beside it."""
    from mlflow.entities import LoggedModelOutput

    client = tracking.client(uri)
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id=experiment,
        name=re.sub(r"[/:.%\"']", "-", name),  # MLflow is stricter here than with the name of a registered model
        source_run_id=run_id,
        tags=dict(tags),
        params={k: v[:250] for k, v in tracking.flatten(params).items()},
        model_type=bundle.config.task,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="latentzoom-model-") as temporary:
            path = Path(temporary) / "model"
            owner = {"run_id": run_id, "model_id": logged.model_id, "location": logged.artifact_location}
            _save(path, folder, bundle, with_inputs=uri.startswith(("databricks", "uc")), **owner)
            if report is not None:
                storage.write_json(str(path / REPORT_PATH), dict(report))
            client.log_model_artifacts(logged.model_id, str(path))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_id)


def _save(
    path: Path, folder: Path, bundle: Bundle, *, run_id: str, model_id: str, location: str, with_inputs: bool = False
) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model

    pipeline = Path(__file__).resolve().parent.parent / "pipeline"
    code = path.parent / "code" / "pipeline"
    shutil.copytree(pipeline, code, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "weights"))
    mlflow.pyfunc.save_model(
        str(path),
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"bundle": str(folder)},
        code_paths=[str(code)],
        signature=signature(with_inputs=with_inputs),
        input_example=input_example(bundle),
        pip_requirements=requirements(),
        mlflow_model=Model(artifact_path=location, run_id=run_id, model_uuid=model_id, model_id=model_id),
    )
    for cache in path.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)


def signature(*, with_inputs: bool = False) -> Any:
    """Answer columns of the served model, and its request columns where the registry insists on them (Unity Catalog).

    MLflow drops every column that a signature does not name before the model sees it, and turns numbers into doubles:
    a misspelt column would be ignored without a word. So the model checks its requests itself."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    numbers = ("num", "height", "width", "scale", "seed", "steps")
    request: list[Any] = [
        ColSpec(DataType.string, "task"),
        ColSpec(DataType.string, "image", required=False),
        *[ColSpec(DataType.double, name, required=False) for name in numbers],
    ]
    answer: list[Any] = [ColSpec(DataType.long, n) for n in ("request", "seed", "height", "width")]
    outputs = Schema([*answer, ColSpec(DataType.string, "png")])
    return ModelSignature(Schema(request), outputs) if with_inputs else ModelSignature(outputs=outputs)


def input_example(bundle: Bundle) -> Any:
    """A request that this model can answer."""
    import pandas as pd
    from PIL import Image

    from orchestration.served_model import encode_png

    if bundle.config.task == "generation":
        size = bundle.config.image_size
        request = {"task": "generate", "num": 1.0, "height": float(size), "width": float(size * 3 // 2), "seed": 0.0}
        return pd.DataFrame([request])
    side = bundle.config.lr_size or 16
    picture = encode_png(Image.new("RGB", (side, side), (120, 90, 60)))
    return pd.DataFrame([{"task": "upscale", "image": picture, "scale": 3.3, "seed": 0.0}])


def requirements() -> list[str]:
    """Exact versions of what the served model imports, less local labels such as "+cpu", which no index has."""
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in _REQUIREMENTS]
