"""How training workers on CPUs find each other: on the network that Ray uses, not where a machine's own name leads.

Gloo listens on the address of the machine's name. On Debian that is 127.0.1.1, and of a name that is unknown 127.0.0.1:
no other machine can come there. (NCCL looks at the interfaces themselves, and leaves the loopback out.)
"""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


class RayNetwork(TorchConfig):
    """Ray Train's setup of torch's process group, with every worker's interface chosen before."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnRayNetwork


class _OnRayNetwork(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_interface_of_ray)
        super().on_start(worker_group, backend_config)


def use_interface_of_ray() -> None:
    """Have Gloo use the interface with this node's address in the cluster. One that was chosen by hand is kept."""
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault(VARIABLE, name)


def interface_of(address: str) -> str:
    """The name of the network interface with this address; "" where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family in (socket.AF_INET, socket.AF_INET6) and a.address == address for a in addresses):
            return name
    return ""
