"""A model whose store does not answer, or refuses, is one line: by command, in Python, for registries with artifacts
elsewhere."""

import socket

import botocore.exceptions
import pytest

from orchestration import registry, tracking
from orchestration.cli import main
from pipeline.errors import UserError


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
