"""A tracking server that is heard, but whose answer is lost: MLflow's client asks again, and nothing is there twice."""

from __future__ import annotations

import http.client
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow import MlflowClient
from servers import answers, free_port, mlflow, process, wait_until
from tiny_bundle import make_bundle

from orchestration import registry

pytestmark = pytest.mark.slow
REPORT = {
    "task": "generation", "data": "/data/val", "data_digest": "d" * 64, "protocol_version": 1, "num": 8, "seed": 0,
    "sampler": "x", "figures": [],
}  # fmt: skip


class Listener(ThreadingHTTPServer):
    """Before the server at `port`. lose: end of the path whose next answer is dropped, once the server has given it."""

    def __init__(self, port: int) -> None:
        self.lose, self.num_lost = "", 0
        listener = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def forward(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server = http.client.HTTPConnection("127.0.0.1", port)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                content = answer.read()
                if listener.lose and self.path.endswith(listener.lose) and self.command != "GET":
                    listener.lose, listener.num_lost = "", listener.num_lost + 1
                    self.close_connection = True
                    return
                self.send_response_only(answer.status)
                self.send_header("Content-Type", answer.getheader("Content-Type", ""))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = mlflow(
        "server", "--workers", "1", "--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/store.db",
        "--artifacts-destination", str(folder / "artifacts"),
    )  # fmt: skip
    with process(command, folder / "log", env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}, cwd=folder) as server:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), server, folder / "log", "mlflow server")
        made = Listener(port)
        yield made
        made.shutdown()


@pytest.mark.parametrize(
    ("during", "path"),
    [
        ("register", "model-versions/create"),
        ("register", "registered-models/create"),
        ("register", "registered-models/alias"),
        ("promote", "registered-models/create"),  # the lock
        ("promote", "registered-models/alias"),
        ("promote", "registered-models/delete"),
    ],
)
def test_an_answer_that_is_lost_makes_nothing_twice(listener, tmp_path, cache, monkeypatch, during, path):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    name, uri = f"{during}-{path.replace('/', '-')}", f"http://127.0.0.1:{listener.server_port}"
    bundle, before = make_bundle(tmp_path / "bundle"), listener.num_lost
    listener.lose = path if during == "register" else ""
    version = registry.register(bundle, name, tracking_uri=uri, report=REPORT)
    listener.lose = path if during == "promote" else ""
    start = time.monotonic()
    assert registry.promote(name, tracking_uri=uri).promote
    assert listener.num_lost == before + 1 and time.monotonic() - start < 30  # it waits for no lock of its own
    client = MlflowClient(uri, uri)
    found = client.search_model_versions(f"name = '{name}'")
    assert [(v.version, sorted(client.get_model_version(name, v.version).aliases)) for v in found] == [
        ("1", ["candidate", "champion"])
    ]
    assert [model.name for model in client.search_registered_models()].count(name) == 1
    assert not [model.name for model in client.search_registered_models() if "lock" in model.name]
    assert registry.resolve(version.uri, tracking_uri=uri).is_dir()


def test_a_registration_that_was_heard_and_then_killed_is_found_again(listener, tmp_path, cache, monkeypatch):
    """The answer is lost for good: the server has the version, and its client was told that nobody answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, tags = f"http://127.0.0.1:{listener.server_port}", {"latentzoom.pipeline": "key"}
    listener.lose = "model-versions/create"
    with pytest.raises(registry.tracking.StoreSilent):
        registry.register(make_bundle(tmp_path / "bundle"), "heard", tracking_uri=uri, report=REPORT, tags=tags)
    assert registry.registered_by("another", "heard", tracking_uri=uri) is None
    found = registry.registered_by("key", "heard", tracking_uri=uri)
    assert found is not None and found.version == "1"
    candidate = registry.get_version("heard", "candidate", tracking_uri=uri)
    assert candidate is not None and candidate.version == "1"
    assert registry.promote("heard", tracking_uri=uri).promote  # its model was not deleted


def test_what_a_killed_promotion_left_is_put_in_order_by_the_next(listener, tmp_path, cache, monkeypatch):
    uri = f"http://127.0.0.1:{listener.server_port}"
    registry.register(make_bundle(tmp_path / "bundle"), "left", tracking_uri=uri, report=REPORT)
    monkeypatch.setattr(registry.champion, "LEFT_S", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(registry.champion, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(MlflowClient, "delete_registered_model", lambda *_: None)  # the process is gone by then
        with pytest.raises(KeyboardInterrupt):
            registry.promote("left", tracking_uri=uri)
    client = MlflowClient(uri, uri)
    assert "left_champion_lock" in [model.name for model in client.search_registered_models()]
    assert not registry.promote("left", tracking_uri=uri).promote  # it is the champion already
    assert "left_champion_lock" not in [model.name for model in client.search_registered_models()]
    assert registry.require_version("left", "champion", uri).tags["latentzoom.previous_champion"] == ""
