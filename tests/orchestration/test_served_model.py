"""The registered model in MLflow's scoring server: right pictures in every usual wrapping, and answers that help."""

import base64
import io

import mlflow.pyfunc
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.registry.logged_model import _save
from pipeline.bundle import load_bundle
from pipeline.model import LatentZoom

TestClient = pytest.importorskip("fastapi.testclient").TestClient


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, as `register` logs it."""
    from pathlib import Path

    root = tmp_path_factory.mktemp("served")
    bundle = make_bundle(root / "b")
    _save(root / "model", Path(bundle), load_bundle(bundle), run_id="0" * 32, model_id="m-1", location=str(root))
    return root


@pytest.fixture(scope="module")
def served(folder):
    return mlflow.pyfunc.load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def client(served):
    return TestClient(scoring_server.init(served))


@pytest.fixture(scope="module")
def expected(folder):
    return np.asarray(LatentZoom.load(str(folder / "b")).upscale(low(), 2.5)).astype(int)


def low():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8))


def sent(form="PNG", **options):
    buffer = io.BytesIO()
    low().save(buffer, form, **options)
    return buffer.getvalue()


def ask(client, **body):
    return client.post("/invocations", json=body)


def picture(row):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))).astype(int)


@pytest.mark.parametrize(
    "image",
    [
        base64.b64encode(sent()).decode(),
        base64.encodebytes(sent()).decode(),
        base64.urlsafe_b64encode(sent()).decode(),
        f"data:image/png;base64,{base64.b64encode(sent()).decode()}",
        base64.b64encode(sent("WEBP", lossless=True)).decode(),
        base64.b64encode(sent("BMP")).decode(),
    ],
    ids=["plain", "wrapped", "url-safe", "data uri", "webp", "bmp"],
)
def test_a_picture_in_every_usual_wrapping(client, expected, image):
    reply = ask(client, dataframe_records=[{"task": "upscale", "image": image, "scale": 2.5}])
    assert reply.status_code == 200, reply.text
    (row,) = reply.json()["predictions"]
    assert (row["request"], row["height"], row["width"]) == (0, 20, 25)
    assert np.abs(picture(row) - expected).max() <= 1


@pytest.mark.parametrize("wrapping", ["dataframe_records", "instances", "inputs", "dataframe_split", "columns", "one"])
def test_every_envelope_of_mlflow(client, wrapping):
    row = {"task": "generate", "num": 2, "height": 20, "width": 33, "seed": 7, "steps": 1}
    body = {
        "dataframe_split": {"dataframe_split": {"columns": list(row), "data": [list(row.values())]}},
        "columns": {"inputs": {name: [value] for name, value in row.items()}},
        "one": {"inputs": row},
    }.get(wrapping, {wrapping: [row]})
    reply = ask(client, **body)
    assert reply.status_code == 200, reply.text
    assert [(r["seed"], r["height"], r["width"]) for r in reply.json()["predictions"]] == [(7, 20, 33), (8, 20, 33)]


IMAGE = base64.b64encode(sent()).decode()
GOOD = {"task": "generate", "height": 16, "width": 16, "steps": 1}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"task": "upscale", "image": "not a picture", "scale": 2.0}],
            "request 0: `image` cannot be read as a picture",
        ),
        ([{"task": "upscale", "image": IMAGE[:40], "scale": 2.0}], "request 0: `image` "),
        ([{"task": "upscale", "image": "?", "scale": 2.0}], "request 0: `image` is not base64"),
        ([GOOD, {**GOOD, "heigth": 9}], "request 1: the column `heigth` is unknown to generate"),
        ([GOOD, {**GOOD, "steps": 10**6}], "request 1: `steps` = 1000000"),
        ([{**GOOD, "num": 40}] * 2, "80 pictures in one call are not allowed; use at most 64"),
        ([{"task": "upscale", "image": IMAGE, "height": 9000, "width": 9000}], "request 0: 1 of 9000x9000 pixels"),
        ([{"task": "upscale", "image": IMAGE}], "request 0: give either `scale` or both"),
        ([{"num": 2}], "request 0: the column `task` is missing"),
    ],
)
def test_every_mistake_is_one_sentence_with_status_400(client, rows, words):
    reply = ask(client, dataframe_records=rows)
    assert reply.status_code == 400
    message = reply.json()["message"]
    assert message.startswith(words) and "\n" not in message and "stack" not in reply.text.lower()


def test_rows_without_columns_are_named(client):
    reply = ask(client, inputs=[1, 2])
    assert reply.status_code == 400 and "send dataframe_records" in reply.json()["message"]


def test_columns_of_different_lengths_are_named(served):
    with pytest.raises(MlflowException, match="^the request's columns do not fit together"):
        served.predict({"task": ["upscale", "upscale"], "image": ["x"]})


def test_in_python_it_is_the_same_sentence(served):
    with pytest.raises(MlflowException, match="^request 0: the column `task` is 'x' and is not allowed"):
        served.predict([{"task": "x"}])
