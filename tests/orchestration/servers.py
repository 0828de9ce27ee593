"""Real servers for tests: processes that are awaited by asking them, and stopped by their own id."""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(ready, process, log, what, tries=600):
    """Ask until it answers; fail with the log when the process ends or never answers."""
    for _ in range(tries):
        if ready():
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(f"{what} did not start:\n{Path(log).read_text()[-3000:]}")


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False


@contextlib.contextmanager
def process(command, log, *, env=None, cwd=None, user=None, stop=15):
    env = dict(env or os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # MLflow calls uvicorn by name
    with open(log, "wb") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=cwd, user=user, start_new_session=True
        )
        try:
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, stop)
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, 9)
                started.wait()


def mlflow(*arguments):
    return [sys.executable, "-m", "mlflow", *arguments]


def postgres_bin():
    found = shutil.which("initdb")
    folders = [str(Path(found).resolve().parent)] if found else sorted(glob.glob("/usr/lib/postgresql/*/bin"))  # noqa: PTH207
    return folders[-1] if folders else None


@contextlib.contextmanager
def postgres():
    """A PostgreSQL of our own on a free port; yields its SQLAlchemy URI. It refuses to run as root, so not as root."""
    folder, binary, port = tempfile.mkdtemp(prefix="latentzoom-pg-"), postgres_bin(), free_port()
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    data, log = f"{folder}/data", f"{folder}/log"
    try:
        subprocess.run(
            [f"{binary}/initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"],
            check=True, capture_output=True, user=user, cwd=folder,
        )  # fmt: skip
        command = [f"{binary}/postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"]
        with process([*command, "-c", "fsync=off"], log, cwd=folder, user=user, stop=2) as server:
            ready = [f"{binary}/pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
            wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, server, log, "PostgreSQL")
            yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
