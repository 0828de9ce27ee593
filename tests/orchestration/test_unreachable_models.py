"""A model whose store does not answer, or refuses, is one line: by command, in Python, for registries with artifacts
elsewhere."""

import socket

import botocore.exceptions
import pytest
import s3fs
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from pipeline.errors import UserError
from pipeline.model import LatentZoom


@pytest.fixture
def urls(monkeypatch, cache):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    return {"http": f"http://127.0.0.1:{port}/bundle", "s3": "s3://bucket/bundle"}


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_every_command_that_loads_a_model(urls, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for arguments in (["generate", "--model", urls[kind]], ["register", urls[kind], "m"]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"latentzoom: error: cannot reach {urls[kind]}") and len(line) < 400
        assert ("check the credentials" if kind == "s3" else "check the address") in line
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "cache"])
    with pytest.raises(UserError, match=f"^cannot reach {urls[kind]}[^\n]*$"):
        registry.load(urls[kind])


@pytest.mark.parametrize(
    "error",
    [
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1/"),
        PermissionError("Forbidden"),
        ModuleNotFoundError("No module named 'google.cloud'"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_artifacts_in_a_store_that_refuses(error):
    with pytest.raises(tracking.StoreError, match="^[^\n]*joe-free-host[^\n]*$") as caught:
        with tracking.user_errors("postgresql://joe:hunter2@joe-free-host/x"):
            raise error
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its trace
        with tracking.user_errors("http://host"):
            _ = 1 // 0


@pytest.fixture
def s3(urls, monkeypatch, tmp_path):
    """A simulated S3 (moto) with the bucket "models", in it half a bundle. Each test has a client of its own."""
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "DEFAULT_REGION": "us-east-1",
        "ENDPOINT_URL": url,
        "MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    make_bundle(tmp_path / "bundle")
    client.upload_file(str(tmp_path / "bundle" / "config.json"), "models", "half/config.json")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


CREDENTIALS, ADDRESS = "check the credentials and what they permit", "check the address and the network"
SITUATIONS = {
    "no such key": ("models/none", {}, "no bundle at s3://models/none: it has no config.json"),
    "part of it": ("models/half", {}, "no such file: s3://models/half/"),
    "no such bucket": ("none/b", {}, "s3://none/b"),
    "no such profile": ("models/b", {"AWS_PROFILE": "none"}, ADDRESS),
    "half of the credentials": ("models/b", {"AWS_SECRET_ACCESS_KEY": None}, CREDENTIALS),
    "no credentials": ("models/b", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, CREDENTIALS),
    "wrong credentials": ("models/b", {"AWS_ACCESS_KEY_ID": "other"}, CREDENTIALS),
    "down": ("models/b", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ADDRESS),
    "an endpoint that is no URL": ("models/b", {"AWS_ENDPOINT_URL": "127.0.0.1:9"}, ADDRESS),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_an_object_store_in_every_door(s3, situation, tmp_path, monkeypatch, capsys):
    place, variables, words = SITUATIONS[situation]
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if situation == "wrong credentials":
        monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # else any will do
        monkeypatch.setattr("moto.core.responses.ActionAuthenticatorMixin.request_count", 0)
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", f"s3://{place}", "--out", "made"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("latentzoom: error: ") and words in line and len(line) < 400
    assert not (tmp_path / "made").exists()
    for load in (registry.load, LatentZoom.load):
        with pytest.raises(UserError) as caught:
            load(f"s3://{place}")
        assert words in str(caught.value) and "\n" not in str(caught.value)
