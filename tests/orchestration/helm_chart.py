"""Renders infra/chart with the real Helm: of PATH, or the one that `make helm` puts into build/helm."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "infra/chart"
TRACKED = {"trackingUri": "http://mlflow.example.internal:5000"}


def helm(*words, **options):
    found = shutil.which("helm") or (ROOT / "build/helm/helm")
    if not Path(found).is_file():
        pytest.skip("no Helm here: `make helm` brings one (x86-64 Linux)")
    return subprocess.run([str(found), *words], capture_output=True, text=True, check=False, **options)


def render(values=None, *, name="latentzoom", namespace="latentzoom"):
    """Every object of the chart with these values over its own, by (kind, name)."""
    result = template(TRACKED if values is None else values, name=name, namespace=namespace)
    assert result.returncode == 0, result.stderr
    objects = [each for each in yaml.safe_load_all(result.stdout) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def template(values, *, name="latentzoom", namespace="latentzoom"):
    words = ["template", name, str(CHART), "--namespace", namespace, "-f", "-"]
    return helm(*words, input=yaml.safe_dump(values))
