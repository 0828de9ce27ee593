"""The compose file: MLflow behind passwords, PostgreSQL, and an S3 store, on the loopback of one machine.

Every password comes from infra/.env; there is none to begin with, and without one nothing starts.
"""

from __future__ import annotations

import json
from typing import Any

from orchestration.infra.values import HEADER, Values

SECRETS = (
    "POSTGRES_PASSWORD",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
)


def _needed(name: str) -> str:
    """Compose refuses to start while the variable is unset or empty."""
    return f"${{{name}:?set {name} in infra/.env, see infra/.env.example}}"


def compose(values: Values) -> dict[str, Any]:
    """docker compose -f infra/compose.yaml --env-file infra/.env up -d --build"""
    tracking = values.tracking
    return {
        "name": values.name,
        "services": {
            "postgres": {
                "image": tracking.postgres_image,
                "environment": {
                    "POSTGRES_USER": "mlflow",
                    "POSTGRES_DB": "mlflow",
                    "POSTGRES_PASSWORD": _needed("POSTGRES_PASSWORD"),
                    "POSTGRES_INITDB_ARGS": "--auth-host=scram-sha-256",
                },
                "volumes": ["postgres:/var/lib/postgresql/data"],
                "healthcheck": _health("pg_isready -U mlflow"),
                "restart": "unless-stopped",
            },
            "s3": {
                "image": tracking.s3_image,
                "command": ["server", "-dir=/data", "-s3", "-s3.config=/etc/s3.json", "-s3.port=8333"],
                "configs": [{"source": "s3", "target": "/etc/s3.json"}],
                "ports": [f"127.0.0.1:{tracking.s3_port}:8333"],
                "volumes": ["s3:/data"],
                "restart": "unless-stopped",
            },
            "bucket": _bucket(values),
            "mlflow": _mlflow(values),
        },
        "configs": {"s3": {"content": _s3_config()}},
        "volumes": {"postgres": {}, "s3": {}, "auth": {}},
    }


def _mlflow(values: Values) -> dict[str, Any]:
    tracking = values.tracking
    hosts = [f"localhost:{tracking.mlflow_port}", f"127.0.0.1:{tracking.mlflow_port}"]
    hosts.append(tracking.tracking_uri.split("://")[-1].rstrip("/"))
    return {
        "build": {"context": "tracking"},
        # The host is that of the container's own network; the machine publishes the port on its loopback only.
        "command": [
            "mlflow",
            "server",
            "--app-name=basic-auth",
            "--host=0.0.0.0",
            "--port=5000",
            "--workers=2",
            f"--artifacts-destination=s3://{tracking.bucket}/mlflow",
            f"--allowed-hosts={','.join(hosts)}",
        ],
        "environment": {
            "MLFLOW_BACKEND_STORE_URI": f"postgresql://mlflow:{_needed('POSTGRES_PASSWORD')}@postgres/mlflow",
            "MLFLOW_AUTH_ADMIN_PASSWORD": _needed("MLFLOW_AUTH_ADMIN_PASSWORD"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": _needed("MLFLOW_FLASK_SERVER_SECRET_KEY"),
            **_s3_client(),
        },
        "ports": [f"127.0.0.1:{tracking.mlflow_port}:5000"],
        "volumes": ["auth:/auth"],
        "healthcheck": _health("python -c \"import urllib.request as r; r.urlopen('http://127.0.0.1:5000/health')\""),
        "depends_on": {
            "postgres": {"condition": "service_healthy"},
            "bucket": {"condition": "service_completed_successfully"},
        },
        "restart": "unless-stopped",
    }


def _bucket(values: Values) -> dict[str, Any]:
    """Makes the bucket once the store answers."""
    code = (
        "import boto3, time\n"
        "s3 = boto3.client('s3')\n"
        "while True:\n"
        "    try:\n"
        f"        names = [b['Name'] for b in s3.list_buckets()['Buckets']]\n"
        f"        if '{values.tracking.bucket}' not in names: s3.create_bucket(Bucket='{values.tracking.bucket}')\n"
        "        break\n"
        "    except Exception as error:\n"
        "        print(error, flush=True); time.sleep(2)\n"
    )
    return {
        "build": {"context": "tracking"},
        "command": ["python", "-c", code],
        "environment": _s3_client(),
        "depends_on": {"s3": {"condition": "service_started"}},
    }


def _s3_client() -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": "http://s3:8333",
        "MLFLOW_S3_ENDPOINT_URL": "http://s3:8333",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": _needed("S3_ACCESS_KEY"),
        "AWS_SECRET_ACCESS_KEY": _needed("S3_SECRET_KEY"),
    }


def _s3_config() -> str:
    credentials = [{"accessKey": _needed("S3_ACCESS_KEY"), "secretKey": _needed("S3_SECRET_KEY")}]
    identity = {
        "name": "latentzoom",
        "credentials": credentials,
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    return json.dumps({"identities": [identity]}, indent=1) + "\n"


def _health(command: str) -> dict[str, Any]:
    return {"test": ["CMD-SHELL", command], "interval": "5s", "timeout": "5s", "retries": 20}


def basic_auth() -> str:
    """MLflow's users. The administrator's first password comes from the environment; nobody may do anything unasked."""
    return f"""{HEADER}[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:////auth/users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def env_example() -> str:
    """Names without values, and how to make some."""
    names = "".join(f"{name}=\n" for name in SECRETS)
    listing = " ".join(SECRETS)
    return f"""{HEADER}# Make infra/.env (git ignores it) with a random value for each name:
#   (umask 077; for n in {listing}; do
#      echo "$n=$(openssl rand -hex 24)"; done > infra/.env)
{names}"""
