"""Machines on addresses of their own: Linux namespaces on a bridge, whose links can be cut and made to lose packets.

A machine has its own network, process ids, host name, shared memory and disk; killed, it is gone at once with all that
ran on it, and the others hear nothing of it. Needs root, `ip` and `nft`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shlex
import shutil
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ray_head import kill_tree

HERE = 1
"""This process's own last number on the network."""
_BOOT = 'mount --bind "$1" "$2" && mount -t tmpfs tmpfs /dev/shm && hostname "$3" && shift 3 && exec "$@"'


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{shlex.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


@functools.lru_cache(maxsize=1)
def why_not() -> str:
    """Why this machine can have no such networks; "" where it can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if missing := [name for name in ("ip", "nft", "unshare", "setpriv") if not shutil.which(name)]:
        return f"no {missing[0]} (Debian: iproute2, nftables, util-linux)"
    try:
        with network() as net:
            machine = net.add("probe")
            machine.lose(0.1)
            machine.start("true")
            assert machine.process is not None
            if status := machine.process.wait():
                return f"a machine ends with {status}: {machine.log.read_text().strip()}"
    except OSError as error:
        return str(error)
    return ""


class Machine:
    """One address on the network. `disk`: what it sees as `net.disk`, here."""

    def __init__(self, net: Network, name: str, number: int, beside: Machine | None) -> None:
        self.net, self.name, self.address = net, name, f"{net.prefix}.{number}"
        self.namespace, self.port = f"{net.id}-{name}", f"{net.id[-4:]}{number}"
        if beside is not None:
            self.namespace, self.port, self.address = beside.namespace, beside.port, beside.address
        self.disk, self.log = net.folder / "disks" / name, net.folder / f"{name}.log"
        self.disk.mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None
        self._again: Callable[[], None] | None = None
        self._lock = threading.RLock()
        if beside is None:
            self._connect()

    def _connect(self) -> None:
        net = self.net
        run("ip", "netns", "add", self.namespace)
        run(
            "ip", "link", "add", self.port, "netns", net.switch, "type", "veth", "peer", "eth0", "netns", self.namespace
        )
        run("ip", "-n", net.switch, "link", "set", self.port, "master", "bridge", "up")
        for words in ("link set lo up", "link set eth0 up", f"address add {self.address}/24 dev eth0"):
            run("ip", "-n", self.namespace, *words.split())
        self._nft("add table inet faults", "add chain inet faults arrival { type filter hook input priority 0; }")

    def start(self, *command: str, again: bool = False, **environment: str) -> None:
        """Switch the machine on, with a command as all that it does. again: whenever that ends, or the machine is
        killed and `revive`d, as a new machine with an empty disk."""
        boot = ["setpriv", "--pdeathsig", "KILL"]  # it ends with this process
        boot += ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork"]
        boot += [
            "--kill-child",
            "--mount-proc",
            "sh",
            "-ec",
            _BOOT,
            "sh",
            str(self.disk),
            str(self.net.disk),
            self.name,
        ]
        (self.disk / "tmp").mkdir(exist_ok=True)
        values = {"TMPDIR": f"{self.net.disk}/tmp", "LATENTZOOM_CACHE": f"{self.net.disk}/cache"} | environment
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*boot, *command], env={**os.environ, **values}, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, cwd=self.net.folder, start_new_session=True,
            )  # fmt: skip

        def once_more() -> None:
            if again:
                shutil.rmtree(self.disk, ignore_errors=True)
                self.disk.mkdir(exist_ok=True)
            self.start(*command, again=again, **environment)

        self._revive, self._again = once_more, once_more if again else None

    def kill(self) -> None:
        """Gone, until `revive`."""
        with self._lock:
            self._again = None
            if self.process is not None:
                kill_tree(self.process)  # the first process of its namespace, and all others with it

    def revive(self) -> None:
        self._revive()

    def tend(self) -> None:
        """What whoever runs the cluster does with a machine that ended by itself: put a new one in its place."""
        with self._lock:
            if self._again is not None and self.process is not None and self.process.poll() is not None:
                self._again()

    def cut(self) -> None:
        """Pull the cable: nothing comes or goes, and nobody is told."""
        run("ip", "-n", self.net.switch, "link", "set", self.port, "down")

    def join(self) -> None:
        run("ip", "-n", self.net.switch, "link", "set", self.port, "up")

    def lose(self, fraction: float) -> None:
        """From now on every packet that arrives from another machine is lost with this probability."""
        share = f"numgen random mod 1000 < {round(1000 * fraction)}" if fraction < 1 else ""
        rule = f"add rule inet faults arrival iifname eth0 {share} counter drop"
        self._nft("flush chain inet faults arrival", *([rule] if fraction else []))

    def num_lost(self) -> int:
        """Packets lost since the last `lose`."""
        words = ["ip", "netns", "exec", self.namespace, "nft", "list", "chain", "inet", "faults", "arrival"]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        return int(found[found.index("packets") + 1]) if "packets" in found else 0

    def listens(self, port: int) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.address, port), timeout=2):
            return True
        return False

    def _nft(self, *lines: str) -> None:
        run("ip", "netns", "exec", self.namespace, "nft", "; ".join(lines))


class Network:
    """A switch in a namespace of its own. disk: the path at which every machine sees its own disk."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lz-", dir="/tmp"))  # socket paths must be short
        self.id, self.disk = f"lz{os.getpid()}{secrets.choice(string.ascii_lowercase)}", self.folder / "disk"
        self.disk.mkdir()
        self.prefix = f"198.18.{secrets.randbelow(256)}"  # RFC 2544: of no network but those that are tested
        self.switch = f"{self.id}-switch"
        self.machines: dict[str, Machine] = {}
        self._closing = threading.Event()
        self._tending = threading.Thread(target=self._tend, daemon=True)

    def open(self) -> None:
        _remove_left()
        run("ip", "netns", "add", self.switch)
        run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge", "stp_state", "0")
        run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        run("ip", "link", "add", self.id, "type", "veth", "peer", "here", "netns", self.switch)
        run("ip", "-n", self.switch, "link", "set", "here", "master", "bridge", "up")
        run("ip", "address", "add", f"{self.prefix}.{HERE}/24", "dev", self.id)
        run("ip", "link", "set", self.id, "up")
        self._tending.start()

    def add(self, name: str, beside: Machine | None = None) -> Machine:
        """A machine, or with `beside` what lives on at its address whether it is killed or not."""
        self.machines[name] = Machine(self, name, HERE + 1 + len(self.machines), beside)
        return self.machines[name]

    def close(self) -> None:
        self._closing.set()
        if self._tending.is_alive():
            self._tending.join()
        for machine in self.machines.values():
            machine.kill()
        for name in {*(machine.namespace for machine in self.machines.values()), self.switch}:
            with contextlib.suppress(OSError):
                run("ip", "netns", "delete", name)  # with its links
        with contextlib.suppress(OSError):
            run("ip", "link", "delete", self.id)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tend(self) -> None:
        while not self._closing.wait(0.5):
            for machine in list(self.machines.values()):
                machine.tend()


def _remove_left() -> None:
    """Namespaces of processes that were killed; what ran in them went with the process."""
    for path in Path("/run/netns").glob("lz*-*"):
        left = re.fullmatch(r"lz(\d+)[a-z]-.*", path.name)
        if left and not Path("/proc", left[1]).exists():
            with contextlib.suppress(OSError):
                run("ip", "netns", "delete", path.name)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    net = Network()
    try:
        net.open()
        yield net
    finally:
        net.close()


def wait_until(ready: Callable[[], bool], what: str, within_s: float = 120.0) -> None:
    end = time.monotonic() + within_s
    while not ready():
        if time.monotonic() > end:
            raise AssertionError(f"not within {within_s:.0f} s: {what}")
        time.sleep(0.3)


if __name__ == "__main__":
    print(why_not() or "networks can be made here", file=sys.stderr)
    sys.exit(bool(why_not()))
