"""The plain files of infra/: valid by published readers, one version of everything, closed by default."""

from __future__ import annotations

import configparser
import inspect
import json
import re
import shutil
import subprocess
import time
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray_head import ray_head, status

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
SECRETS = (
    "POSTGRES_PASSWORD",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
)


def load(name: str):
    return yaml.safe_load((INFRA / name).read_text())


def image() -> str:
    """The Dockerfile with its continuation lines joined."""
    return (INFRA / "Dockerfile").read_text().replace("\\\n", " ")


def packages() -> list[str]:
    (line,) = re.findall(r"apt-get install (.*?)&&", image())
    return [word for word in line.split() if not word.startswith("-")]


def test_the_compose_file_follows_the_published_schema():
    vendored = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(vendored.read_text())
    compose = load("compose.yaml")
    jsonschema.validate(compose, schema)
    compose["services"]["mlflow"]["dependson"] = []
    with pytest.raises(jsonschema.ValidationError, match="dependson"):
        jsonschema.validate(compose, schema)


def test_the_compose_file_has_no_password_and_listens_on_the_loopback_only():
    compose = load("compose.yaml")
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in compose["services"]["postgres"]
    text = (INFRA / "compose.yaml").read_text()
    for name in SECRETS:
        assert re.search(rf"\$\{{{name}:\?", text), name  # refuses to start while it is unset or empty
    secret_values = [
        value for service in compose["services"].values() for key, value in service.get("environment", {}).items()
        if re.search("PASSWORD|SECRET|ACCESS_KEY", key)
    ]  # fmt: skip
    assert len(secret_values) >= 6 and all(value.startswith("${") for value in secret_values)
    assert "--app-name=basic-auth" in compose["services"]["mlflow"]["command"]
    # The driver by name: what a bare postgresql:// means has changed from one SQLAlchemy to the next.
    assert compose["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg2://")
    assert "psycopg2-binary==" in (INFRA / "tracking/Dockerfile").read_text()
    assert {"postgres", "mlflow"} <= {name for name, service in compose["services"].items() if "healthcheck" in service}
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert all(v.split(":")[0] in compose["volumes"] for v in service.get("volumes", []))
    example = dict(
        line.split("=", 1) for line in (INFRA / ".env.example").read_text().splitlines() if not line.startswith("#")
    )
    assert example == dict.fromkeys(SECRETS, "")
    auth = configparser.ConfigParser()
    auth.read(INFRA / "tracking/basic_auth.ini")
    assert auth["mlflow"]["default_permission"] == "NO_PERMISSIONS" and "admin_password" not in auth["mlflow"]


def test_the_ray_up_file_follows_rays_published_schema():
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = load("ray-up.yaml")
    jsonschema.validate(config, schema)
    assert config["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    commands = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands and "RAY_AUTH_MODE=token" in commands
    assert not any("shm-size" in option for option in config["docker"]["run_options"])  # Ray sizes it


def test_what_ray_up_starts_can_be_waited_for():
    """Ray's second autoscaler says what it is starting (see test_growing_cluster), its first one does not. `ray up`
    hands the choice to the head's start commands."""
    from ray.autoscaler._private import commands

    source = inspect.getsource(commands.get_or_create_head_node)
    assert 'os.getenv("RAY_UP_enable_autoscaler_v2", "1") == "1"' in source
    assert '"RAY_enable_autoscaler_v2": "1"' in source
    for command in load("ray-up.yaml")["head_start_ray_commands"]:
        assert "autoscaler_v2" not in command


def test_what_ray_up_mounts_lies_in_the_images_home_and_belongs_to_its_user():
    """Ray reads HOME from the image's ENV (else it mounts into /root); files keep the cloud's first user, uid 1000."""
    from ray.autoscaler._private.docker import docker_start_cmds

    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.+)$", image(), re.MULTILINE))))
    (user,) = re.findall(r"^USER (\d+)$", image(), re.MULTILINE)
    assert user == "1000" and f"--uid {user}" in image()
    config = load("ray-up.yaml")
    mounts = dict(config["file_mounts"])
    command = docker_start_cmds(
        "ubuntu", config["docker"]["image"], mounts, "latentzoom", [], "latentzoom", environment["HOME"], "docker"
    )
    assert ":/home/latentzoom/.ray/auth_token" in command and "/root" not in command
    assert "-m 700 /home/latentzoom/.ray" in image()  # else Docker makes the folder, as root


def test_the_image_has_what_kuberay_and_ray_up_call():
    """KubeRay before 1.6 probes with wget; Ray's launcher copies with rsync over ssh."""
    assert {"wget", "rsync", "openssh-client", "build-essential"} <= set(packages())


def test_images_are_locked_and_not_root():
    text = image()
    assert text.index('"$TORCH"') < text.index("requirements.lock") < text.index("COPY pipeline")
    assert re.search(r"--no-deps -r /build/requirements.lock boto3==[\d.]+ s3transfer==[\d.]+", text)
    users = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert users and users[-1] not in ("root", "0")
    assert re.findall(r"^USER (.+)$", (INFRA / "tracking/Dockerfile").read_text(), re.MULTILINE)[-1] == users[-1]
    assert text.index("ARG COMMIT") > text.index("--no-build-isolation")  # a commit does not build all layers anew


def test_only_what_the_image_copies_reaches_the_builder():
    kept = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (.+)$", image(), re.MULTILINE) for word in line.split()[:-1]}
    assert kept == copied and all((ROOT / name).exists() for name in kept)


def test_no_file_holds_a_secret_value():
    for path in INFRA.rglob("*"):
        if path.is_file() and path.name != ".env":
            for line in path.read_text().splitlines():
                found = re.search(r"(?i)(password|secret_?key|token)\s*[:=]\s*[\"']?([A-Za-z0-9+/]{6,})", line)
                assert not found or found[2].startswith(("token", "false")), f"{path.name}: {line}"


@pytest.mark.slow
def test_kuberays_probes_find_a_head_alive_without_its_token():
    """What KubeRay before 1.6 asks in each pod, by wget. The probes carry no token, and the head asks for one."""
    if not shutil.which("wget"):
        pytest.skip("no wget here")
    with ray_head() as head:
        for port, path in ((head.agent_port, "local_raylet_healthz"), (head.dashboard_port, "gcs_healthz")):
            url = f"http://{head.host}:{port}/api/{path}"
            command = ["wget", "-T", "5", "-q", "-O-", url]
            assert wait_for(lambda c=command: subprocess.run(c, capture_output=True, check=False)) == b"success"
        assert status(f"{head.address}/api/jobs/") == 401


def wait_for(ask, tries=300):
    """What a command prints once it succeeds: the agent of a node comes up last."""
    for _ in range(tries):
        result = ask()
        if result.returncode == 0:
            return result.stdout
        time.sleep(0.2)
    raise AssertionError(result.stderr)
