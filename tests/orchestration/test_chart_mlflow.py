"""The chart's MLflow, its command, settings and environment as rendered, run here on a real PostgreSQL."""

from __future__ import annotations

import os

import pytest
import requests
import sqlalchemy
from helm_chart import render
from servers import answers, free_port, postgres, postgres_bin, process, wait_until

SECRET = {
    "POSTGRES_PASSWORD": "not asked for: this server trusts its own machine",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "correct-horse-battery",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "0123456789abcdef",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
}
ADMIN = ("admin", SECRET["MLFLOW_AUTH_ADMIN_PASSWORD"])


@pytest.mark.slow
@pytest.mark.skipif(postgres_bin() is None, reason="no PostgreSQL here: Debian's package postgresql has it")
def test_the_rendered_server_keeps_runs_and_users_in_postgresql_and_lets_no_stranger_in(tmp_path):
    with postgres() as uri:
        server = sqlalchemy.engine.make_url(uri)
        engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in ("CREATE ROLE mlflow LOGIN", "CREATE DATABASE mlflow OWNER mlflow"):
                connection.execute(sqlalchemy.text(statement))
        place = {"host": server.host, "port": server.port, "user": "mlflow", "database": "mlflow"}
        objects = render({"mlflow": {"enabled": True, "postgres": place, "workers": 1}})
        (container,) = objects["Deployment", "latentzoom-mlflow"]["spec"]["template"]["spec"]["containers"]
        settings = tmp_path / "basic_auth.ini"
        settings.write_text(objects["ConfigMap", "latentzoom-mlflow"]["data"]["basic_auth.ini"])
        port = free_port()
        # As in the pod, but on the loopback, on a port that is free, with the file where it is here.
        words = [
            word.replace("0.0.0.0", "127.0.0.1").replace("--port=5000", f"--port={port}")
            for word in container["command"]
        ]
        environment = {**os.environ, **SECRET}
        for each in container["env"]:
            reference = each.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
            environment[each["name"]] = each["value"] if "value" in each else SECRET[reference]
        assert environment["MLFLOW_AUTH_CONFIG_PATH"] == "/etc/mlflow/basic_auth.ini"
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(settings)
        assert environment["PGPASSWORD"] == SECRET["POSTGRES_PASSWORD"]
        url = f"http://127.0.0.1:{port}"
        inside = {"Host": "latentzoom-mlflow.latentzoom.svc:5000"}
        for _ in range(2):  # the second start finds its tables and users
            with process(words, tmp_path / "log", env=environment, cwd=tmp_path) as running:
                # The kubelet's probe carries the pod's address as its host.
                wait_until(lambda: answers(f"{url}/health"), running, tmp_path / "log", "MLflow")
                assert requests.get(f"{url}/health", headers={"Host": "10.1.2.3:5000"}, timeout=20).status_code == 200
                search = f"{url}/api/2.0/mlflow/experiments/search"
                ask = {"json": {"max_results": 1}, "timeout": 20}
                assert requests.post(search, headers=inside, **ask).status_code == 401
                assert requests.post(search, headers=inside, auth=ADMIN, **ask).status_code == 200
                assert requests.post(search, headers=inside, auth=("admin", "wrong"), **ask).status_code == 401
                assert requests.post(search, headers={"Host": "evil.example"}, auth=ADMIN, **ask).status_code == 403
        database = sqlalchemy.create_engine(server.set(database="mlflow"))
        assert {"runs", "experiments", "users"} <= set(sqlalchemy.inspect(database).get_table_names())
