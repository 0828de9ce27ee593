"""A registered model behind `mlflow models serve`; tracking on PostgreSQL, S3 (moto, a simulator) and basic-auth."""

import base64
import io
import json
import os
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from servers import answers, free_port, mlflow, postgres, postgres_bin, process, wait_until
from tiny_bundle import make_bundle

from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from orchestration.tracking.mlflow_reporter import MlflowReporter
from pipeline.errors import UserError
from pipeline.model import LatentZoom

pytestmark = pytest.mark.slow


def picture(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def ask(port, *rows):
    body = json.dumps({"dataframe_records": rows}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["predictions"]


def test_mlflow_serves_generate_and_upscale(tmp_path, cache):
    uri = tracking.tracking_uri(None, tmp_path / "store")
    bundle = make_bundle(tmp_path / "b")
    registry.register(bundle, "tiny", tracking_uri=uri)
    registry.promote("tiny", tracking_uri=uri)
    port, log = free_port(), tmp_path / "serve.log"
    env = os.environ | {"MLFLOW_TRACKING_URI": uri}
    command = mlflow("models", "serve", "-m", "models:/tiny@champion", "--env-manager", "local", "-p", str(port))
    with process(command, log, env=env, cwd=tmp_path) as server:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ping"), server, log, "mlflow models serve")
        low = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        low.save(buffer, "PNG")
        rows = ask(
            port,
            {"task": "generate", "num": 2, "height": 20, "width": 33, "seed": 7, "steps": 2},
            {"task": "upscale", "image": base64.b64encode(buffer.getvalue()).decode(), "scale": 2.5},
        )
        assert [(r["request"], r["seed"], r["height"], r["width"]) for r in rows] == [
            (0, 7, 20, 33), (0, 8, 20, 33), (1, 0, 20, 25)
        ]  # fmt: skip
        model = LatentZoom.load(bundle)
        expected = np.asarray(model.generate(2, (20, 33), seed=7, num_steps=2)[1])
        assert np.abs(picture(rows[1]["png"]).astype(int) - expected).max() <= 1
        expected = np.asarray(model.upscale(low, 2.5))
        assert np.abs(picture(rows[2]["png"]).astype(int) - expected).max() <= 1
        plain = base64.b64encode(buffer.getvalue()).decode()
        webp = io.BytesIO()
        low.save(webp, "WEBP", lossless=True)
        for image in (
            base64.encodebytes(buffer.getvalue()).decode(),
            base64.urlsafe_b64encode(buffer.getvalue()).decode().rstrip("="),
            f"data:image/png;base64,{plain}",
            base64.b64encode(webp.getvalue()).decode(),
        ):
            (row,) = ask(port, {"task": "upscale", "image": image, "scale": 2.5})
            assert np.abs(picture(row["png"]).astype(int) - expected).max() <= 1
        for row, sentence in (
            ({"image": plain[:40], "scale": 2}, "`image` "),
            ({"image": "not a picture", "scale": 2}, "`image` cannot be read as a picture"),
            ({"image": plain, "scal": 2}, "the column `scal` is unknown to upscale; known: "),
            ({"image": plain, "scale": 1000}, "`scale` = 1000"),
            ({"image": plain, "height": 9000, "width": 9000}, "1 of 9000x9000 pixels are not allowed; use at most"),
            ({"image": plain, "scale": 2, "steps": 10**6}, "`steps` = 1000000"),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(port, {"task": "upscale", **row})
            answer = json.load(refused.value)
            assert refused.value.code == 400 and "stack_trace" not in answer, answer
            assert answer["message"].startswith(f"request 0: {sentence}") and "\n" not in answer["message"]


@pytest.fixture
def s3(monkeypatch):
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("boto3", reason="boto3 is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", url),
        ("MLFLOW_S3_ENDPOINT_URL", url),
    ):
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="models")
    yield client
    server.stop()


@pytest.mark.skipif(postgres_bin() is None, reason="PostgreSQL is not installed (apt-get install postgresql)")
def test_everything_works_on_postgresql_s3_and_basic_auth_by_setting_a_url(tmp_path, cache, s3, monkeypatch):
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    port, log = free_port(), tmp_path / "server.log"
    env = os.environ | {
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-secret-for-the-test",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a-long-password-1",
    }
    with postgres() as backend:
        command = mlflow(
            "server", "--backend-store-uri", backend, "--artifacts-destination", "s3://models/mlflow", "--workers", "1",
            "--host", "127.0.0.1", "--port", str(port), "--app-name", "basic-auth",
        )  # fmt: skip
        with process(command, log, env=env, cwd=tmp_path) as server:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), server, log, "mlflow server")
            url = f"http://127.0.0.1:{port}"
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password-1")
            with pytest.raises(UserError, match=r"401|credentials|authenticated"):
                tracking.experiment_id(url)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password-1")
            run_id = tracking.start_run(url, "stage")
            with MlflowReporter(run_id, url, system_metrics=False) as reporter:
                reporter.metrics(1, {"loss": 0.5})
                reporter.images(1, "grid", np.zeros((4, 4, 3), np.uint8))
            tracking.end_run(url, run_id)
            assert tracking.get_run(url, run_id).data.metrics == {"loss": 0.5}
            bundle = make_bundle(tmp_path / "b")
            registry.register(bundle, "tiny", tracking_uri=url, run_id=run_id)
            assert registry.promote("tiny", tracking_uri=url).promote
            folder = registry.resolve("models:/tiny@champion", tracking_uri=url)
            assert registry.bundle_digest(folder) == registry.bundle_digest(bundle)
    keys = [o["Key"] for o in s3.list_objects_v2(Bucket="models")["Contents"]]
    assert any(k.endswith("artifacts/bundle/decoder.safetensors") for k in keys)
    assert any("/images/grid+step+1+" in k for k in keys)
