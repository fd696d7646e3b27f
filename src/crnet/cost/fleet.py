"""Devices of one kind in machines: how many bytes a second pass between them.

Ranks are numbered as ``parallel.world`` does, ``sections.SIZES``, the last size innermost; a
machine has the first ``node`` of them, and so on. What is sent in a ring goes over the links within
a machine, and over the network between machines, where every member in a machine brings its own
share of the network.

Assumed, not measured: a share of a link's bytes that collectives reach, and their start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from crnet.config.units import GIB
from crnet.cost.hardware import DEVICES, Device
from crnet.errors import ConfigError

REACHED_FRAC = 0.8
"""Of a link's or the network's bytes a second."""
START_S = 20e-6
"""Of one collective or transfer, until its bytes flow."""
RESERVE_FRAC, CONTEXT_GIB = 0.06, 1.0
"""Left free of a device's memory (fragments, what libraries take), and its context."""
_KNOWN = ", ".join(name for name, each in DEVICES.items() if each.memory_gib)


@dataclass(frozen=True)
class Fleet:
    """So many devices, ``node`` in each machine."""

    device: Device
    size: int
    node: int
    network_bytes_per_s: float
    """A device's share, one way."""

    @property
    def memory_bytes(self) -> int:
        """That a process may take of its device."""
        return int(((1 - RESERVE_FRAC) * self.device.memory_gib - CONTEXT_GIB) * GIB)

    def is_inside(self, members: int, stride: int) -> bool:
        """Whether so many ranks, each ``stride`` from the next, are in one machine."""
        return members * stride <= self.node

    def ring_bytes_per_s(self, members: int, stride: int) -> float:
        """What each of these ranks sends in a ring of all of them."""
        link = self.device.link_bytes_per_s
        if self.is_inside(members, stride):
            return REACHED_FRAC * link
        together = max(1, self.node // stride)
        network = together * self.network_bytes_per_s
        return REACHED_FRAC * (min(link, network) if together > 1 else network)

    def gather_s(self, size_bytes: float, members: int, stride: int, starts: int = 1) -> float:
        """Seconds until each has all of ``size_bytes``, of which it had its part; as long for a sum
        of which each gets its part. ``starts``: collectives that this is cut into."""
        if members == 1 or not size_bytes:
            return 0.0
        moved = (members - 1) / members * size_bytes
        return moved / self.ring_bytes_per_s(members, stride) + starts * START_S

    def sum_s(self, size_bytes: float, members: int, stride: int, starts: int = 1) -> float:
        """Seconds until each has the sum of what each had: twice a gathering's bytes."""
        return self.gather_s(2 * size_bytes, members, stride, starts)

    def send_s(self, size_bytes: float, members: int, stride: int) -> float:
        """Seconds from one of these ranks to the next, where that is farthest."""
        inside = self.is_inside(members, stride)
        rate = self.device.link_bytes_per_s if inside else self.network_bytes_per_s
        return size_bytes / (REACHED_FRAC * rate) + START_S


def parse_fleet(text: str, node: int = 8, network_gbps: float | None = None) -> Fleet:
    """Read ``64xh100``, or ``h100`` for one.

    Args:
        node: devices of a machine.
        network_gbps: Gb/s a device to other machines; None: its kind's usual.
    Raises:
        ConfigError: unreadable, a device whose memory or links are not known, or machines that are
            not full.
    """
    match = re.fullmatch(r"(?:([0-9]{1,6})x)?(.+)", text)
    size, name = (int(match[1] or 1), match[2]) if match else (0, text)
    problems = []
    if name not in DEVICES or not DEVICES[name].memory_gib or size < 1:
        problems.append(
            f"--devices {text!r} is unknown; write how many and which, 64xh100, of {_KNOWN}"
        )
    if node < 1:
        problems.append(f"--node is {node}; it must be 1 or more")
    elif size > node and size % node:
        problems.append(
            f"--devices {text} on machines of {node} leaves one part empty; take a multiple of "
            f"{node}, or give --node"
        )
    if network_gbps is not None and not 0 < network_gbps < float("inf"):
        problems.append(f"--network-gbps is {network_gbps}; it must be above zero and finite")
    if problems:
        raise ConfigError(problems)
    on = DEVICES[name]
    network = on.network_bytes_per_s if network_gbps is None else network_gbps * 1e9 / 8
    return Fleet(on, size, min(node, size), network)
