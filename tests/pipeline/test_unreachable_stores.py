"""A store that does not answer, or refuses, is one line that names it, in Python and in the command."""

import http.server
import socket
import threading

import pytest

from pipeline import LatentZoom, storage
from pipeline.errors import Missing, Unreachable, UserError, exit_status, is_network_error, without_secrets
from pipeline.importing.checkpoint import read_checkpoint


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Refusing(http.server.BaseHTTPRequestHandler):
    status = 403

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def stores(refusing, monkeypatch):
    """kind → URL of a store there is no way into."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return {
        "nobody listens": f"http://127.0.0.1:{closed_port()}/bundle",
        "no such host": "http://no-such-host.invalid/bundle",
        "refused": f"http://127.0.0.1:{refusing}/bundle",
        "no credentials": "s3://bucket/bundle",
    }


KINDS = ("nobody listens", "no such host", "refused", "no credentials")
CALLS = {
    "load": LatentZoom.load,
    "read": storage.read_bytes,
    "list": storage.list_files,
    "hash": storage.sha256_file,
    "checkpoint": read_checkpoint,
    "write": lambda url: storage.write_bytes(url, b"x"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_words_every_store(stores, kind, call):
    with pytest.raises(UserError) as caught:
        CALLS[call](stores[kind])
    assert "\n" not in str(caught.value) and stores[kind] in str(caught.value)
    if call == "write" and kind != "no credentials":
        assert "nothing can be written to http://" in str(caught.value)
    else:
        assert isinstance(caught.value, Unreachable), caught.value
    if kind == "no credentials":
        assert "check the credentials" in str(caught.value)


def test_what_a_web_server_does_not_have_is_missing_and_not_unreachable(refusing, monkeypatch):
    monkeypatch.setattr(Refusing, "status", 404)
    url = f"http://127.0.0.1:{refusing}/bundle"
    assert not storage.exists(url) and storage.list_files(url) == []
    with pytest.raises(UserError, match="no bundle at http"):
        LatentZoom.load(url)
    with pytest.raises(Missing, match="no such file"):
        storage.sha256_file(url)


def test_a_command_says_it_in_one_line_whoever_raised_it(capsys):
    import aiohttp

    def command():
        raise aiohttp.ClientConnectionError("Cannot connect to host x:1")

    assert exit_status(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("latentzoom: error: cannot reach") and "Cannot connect to host x:1" in line
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its trace
        exit_status(lambda: 1 // 0)


def test_what_signs_a_url_is_not_shown():
    text = "403, url='https://joe:hunter2@host/x?X-Amz-Signature=abc'"
    assert without_secrets(text) == "403, url='https://host/x'"


@pytest.mark.parametrize("module", ["httpx", "httpx2", "httpcore2._exceptions", "botocore.exceptions"])
def test_clients_are_known_by_their_package_whatever_its_generation(module):
    assert is_network_error(type("ConnectError", (Exception,), {"__module__": module})("no route"))
    assert not is_network_error(type("Other", (Exception,), {"__module__": "mine2"})("no route"))


def test_a_store_that_is_connected_to_at_once_is_named():
    with pytest.raises(Unreachable, match="^cannot reach ftp://127.0.0.1:"):
        storage.exists(f"ftp://127.0.0.1:{closed_port()}/bundle/config.json")
