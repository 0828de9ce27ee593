"""Checks of one machine: each is a function that returns findings, and every trouble says what to do in one line."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from orchestration.doctor import torch_builds
from pipeline import storage
from pipeline.errors import UserError, first_line
from pipeline.extras import extra_of, install
from pipeline.redact import redact, url_without_secrets
from pipeline.storage import cache_folder

Level = Literal["ok", "warning", "trouble"]
GIB = 1 << 30
_LOCKED = ("torch", "ray", "deepspeed", "mlflow", "diffusers", "numpy", "pillow", "safetensors", "s3fs", "webdataset")
_MIN_FREE = 10 * GIB
_MIN_SHM = 2 * GIB
_MIN_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """level: "trouble" means that something will fail. todo: what to do, empty when nothing is."""

    level: Level
    topic: str
    text: str
    todo: str = ""

    def line(self) -> str:
        mark = {"ok": "ok      ", "warning": "warning ", "trouble": "TROUBLE "}[self.level]
        return f"{mark} {self.topic:10} {self.text}" + (f" → {self.todo}" if self.todo else "")


def machine(storages: Sequence[str] = ()) -> list[Finding]:
    """Everything that can be known of this machine without asking a server."""
    found = [*versions(), *devices(), *disks(storages), *shared_memory(), *open_files(), *ray_token()]
    for url in storages:
        found += store(url)
    return found


def versions() -> list[Finding]:
    """Python, and the packages whose versions the lock file pins."""
    python = ".".join(map(str, sys.version_info[:3]))
    found = []
    locked = _lock()
    there = {}
    for name in _LOCKED:
        try:
            there[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            extra = extra_of(name)
            todo = f"{install(extra)}, make setup, or use the image" if extra else "make setup, or use the image"
            found.append(Finding("trouble", "versions", f"{name} is not installed", todo))
    for name, version in there.items():
        if name in locked and locked[name] != version:
            todo = f"pip install --no-deps {name}=={locked[name]}, or run `make lock` to accept it"
            found.append(Finding("warning", "versions", f"{name} is {version}, the lock has {locked[name]}", todo))
    if found:
        return found
    text = ", ".join(f"{name} {there[name]}" for name in ("torch", "ray", "deepspeed", "mlflow"))
    return [Finding("ok", "versions", f"python {python}, {text}" + ("" if locked else " (no lock file at hand)"))]


def _lock() -> dict[str, str]:
    file = Path(__file__).resolve().parents[2] / "requirements.lock"
    if not file.is_file():
        return {}
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", file.read_text(), re.MULTILINE)
    return {name.lower(): version for name, version in pins}


def devices() -> list[Finding]:
    """GPUs that torch can use; an NVIDIA driver that torch cannot use is trouble."""
    import torch

    if torch.cuda.is_available():
        found = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            text = f"cuda:{number} {torch.cuda.get_device_name(number)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            if trouble := _without_code(number):
                found.append(Finding("trouble", "devices", f"{text}; {trouble[0]}", trouble[1]))
                continue
            busy = free < total / 2
            todo = "another process uses it; see nvidia-smi" if busy else ""
            found.append(Finding("warning" if busy else "ok", "devices", text, todo))
        return found
    if shutil.which("nvidia-smi"):
        text, todo = _unused_driver(*driver_and_capability())
        return [Finding("trouble", "devices", f"{text}, but torch {torch.__version__} cannot use it", todo)]
    return [Finding("ok", "devices", f"no GPU; {os.cpu_count()} CPU cores")]


def driver_and_capability() -> tuple[str, tuple[int, int] | None]:
    """The NVIDIA driver's version, as in "580.65.06", and the first GPU's compute capability; empty and None where
    nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "", None
    version, _, capability = (lines or [""])[0].partition(",")
    found = re.fullmatch(r"\s*(\d+)\.(\d+)\s*", capability)
    return version.strip(), (int(found[1]), int(found[2])) if found else None


def _without_code(number: int) -> tuple[str, str] | None:
    """What is wrong with a GPU of a generation that this torch has no code for, and what to do; None where it has."""
    import torch

    capability = torch.cuda.get_device_capability(number)
    generations = [
        int(arch.removeprefix("sm_").rstrip("abcdef")) for arch in torch.cuda.get_arch_list() if "sm_" in arch
    ]
    has_forward = any(arch.startswith("compute_") for arch in torch.cuda.get_arch_list())  # compiled for newer ones
    same = [g for g in generations if g // 10 == capability[0] and g % 10 <= capability[1]]
    if not generations or same or (has_forward and capability[0] * 10 > max(generations)):
        return None
    name = f"compute capability {capability[0]}.{capability[1]}"
    return f"torch {torch.__version__} has no code for its {name}", _install(driver_and_capability()[0], capability)


def _install(version: str, capability: tuple[int, int] | None) -> str:
    """What to do: install the newest of torch's builds that runs on the driver and the GPU, or update the driver."""
    if build := torch_builds.for_driver(version, capability):
        # `make setup` would keep a torch of the same version, whatever its build.
        return f"pip uninstall -y torch; pip install --index-url {build.index} torch=={torch_builds.TORCH}"
    builds = torch_builds.for_capability(capability)
    if not builds:
        return f"no build of torch {torch_builds.TORCH} has code for this GPU: use another one"
    needed = ".".join(map(str, builds[-1].driver[:2]))
    what = "runs on with this GPU" if capability else "runs on"
    return f"update the driver: the oldest that torch {torch_builds.TORCH} {what} is {needed}"


def _unused_driver(version: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    """What there is, and what to do."""
    if not version:
        return "an NVIDIA driver that nvidia-smi cannot ask", "look at `nvidia-smi`; in a container: --gpus all"
    return f"NVIDIA driver {version}", _install(version, capability)


def disks(storages: Iterable[str] = ()) -> list[Finding]:
    """Free space where checkpoints, temporary shards and downloaded models go."""
    cache = cache_folder()
    places = {"temporary files": Path(tempfile.gettempdir()), "model cache": cache}
    for url in storages:
        with contextlib.suppress(UserError):  # an address that nothing can open: `store` says so
            if storage.is_local(url):
                places[url] = Path(storage.filesystem(url)[1])
    found = []
    for name, path in places.items():
        free = shutil.disk_usage(_nearest(path)).free
        text = f"{name}: {free / GIB:.0f} GiB free in {path}"
        todo = "free some, or set TMPDIR / LATENTZOOM_CACHE to a larger disk" if free < _MIN_FREE else ""
        found.append(Finding("warning" if todo else "ok", "disk", text, todo))
    return found


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def shared_memory(path: str = "/dev/shm") -> list[Finding]:
    """Ray's object store and NCCL live in shared memory; containers get 64 MiB of it unless told otherwise."""
    if not Path(path).is_dir():
        return [Finding("warning", "shm", f"no {path}", "Ray will use slow files in /tmp; mount a tmpfs there")]
    total = shutil.disk_usage(path).total
    if total < _MIN_SHM:
        todo = "docker run --shm-size=8g, or an emptyDir with medium: Memory at /dev/shm"
        return [Finding("trouble", "shm", f"{path} has {total / GIB:.2f} GiB", todo)]
    return [Finding("ok", "shm", f"{path} has {total / GIB:.0f} GiB")]


def open_files() -> list[Finding]:
    """Ray opens thousands of files and sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_FILES and hard < _MIN_FILES:
        return [Finding("warning", "files", f"at most {hard} open files", "raise it: ulimit -n 65536")]
    return [Finding("ok", "files", f"up to {max(soft, hard)} open files")]


def ray_token() -> list[Finding]:
    """Token authentication must not be off, and the token must be private."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "disabled":
        todo = "unset RAY_AUTH_MODE; anyone who reaches the head can run code"
        return [Finding("trouble", "token", "RAY_AUTH_MODE=disabled", todo)]
    if os.environ.get("RAY_AUTH_TOKEN"):
        return [Finding("ok", "token", "in RAY_AUTH_TOKEN")]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        return [Finding("ok", "token", f"none in {path}; `ray get-auth-token --generate` makes one for a cluster")]
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return [Finding("warning", "token", f"{path} can be read by others", f"chmod 600 {path}")]
    return [Finding("ok", "token", f"{path}, private")]


def store(url: str) -> list[Finding]:
    """Write, read and delete a small file; see whether a second conditional write is refused."""
    shown, probe = url_without_secrets(url), storage.join(url, f".latentzoom-doctor-{uuid.uuid4().hex}")
    content = os.urandom(64)
    step = "write to"
    try:
        there = _nearest(Path(storage.filesystem(url)[1])) if storage.is_local(url) else None
        storage.write_bytes(probe, content)
        step = "read back from"
        if storage.read_bytes(probe) != content:
            return [Finding("trouble", "storage", f"{shown} returns other bytes than were written", "check the store")]
        is_conditional = storage.is_local(url) or _refuses_second_write(probe)
        step = "delete in"
        storage.remove_tree(probe)
        _remove_new_folders(url, there)
    except (UserError, OSError, ImportError, ValueError) as error:
        todo = "check the address, the credentials and the rights (read, write, list, delete)"
        return [Finding("trouble", "storage", f"cannot {step} {shown}: {redact(first_line(error))}", todo)]
    except Exception as error:  # clients of object stores raise their own kinds
        todo = "set the store's credentials (AWS_ACCESS_KEY_ID, ..., AWS_ENDPOINT_URL)"
        name = type(error).__name__
        return [Finding("trouble", "storage", f"cannot {step} {shown}: {name}: {redact(first_line(error))}", todo)]
    if not is_conditional:
        todo = "start no two jobs in one --workdir there"
        return [Finding("warning", "storage", f"{shown} works, but has no conditional writes", todo)]
    return [Finding("ok", "storage", f"{shown}: write, read, delete")]


def _remove_new_folders(url: str, there: Path | None) -> None:
    """Of a local folder, what the probe made below `there`; nothing where something else came into it meanwhile."""
    if there is None:
        return
    folder = Path(storage.filesystem(url)[1])
    with contextlib.suppress(OSError):
        while folder != there:
            folder.rmdir()
            folder = folder.parent


def _refuses_second_write(url: str) -> bool:
    fs, path = storage.filesystem(url)
    try:
        fs.pipe_file(path, b"second", mode="create")
    except (OSError, NotImplementedError):
        return True
    return False
