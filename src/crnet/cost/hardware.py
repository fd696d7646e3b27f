"""Devices: what products and memory reach, by vendors' data sheets; bytes between devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from crnet.config.check_tensor import parts_problems
from crnet.config.model_spec import ModelSpec
from crnet.cost.micro_batch import Precision
from crnet.cost.stages import boundary_bytes, cut
from crnet.cost.workload import Workload
from crnet.errors import ConfigError
from crnet.optimizers._low_precision import Bf16Update
from crnet.recompute.plan import RecomputePlan
from crnet.specs import TensorSpec


@dataclass(frozen=True)
class Device:
    """A device's peaks, and the shares of them that kernels reach.

    The shares, the launch and the issue are those that fit eager traces of this package's models on
    an H100 (a product at 0.7 of the peak, memory at 0.9 in products and 0.8 elsewhere, 2.5 us a
    kernel); they were estimated, not measured here.
    """

    name: str
    bf16_flops_per_s: float
    """Dense, on tensor cores, summed in fp32."""
    tf32_flops_per_s: float
    fp32_flops_per_s: float
    """Without tensor cores: what torch does by default."""
    bytes_per_s: float
    product_frac: float = 0.7
    product_bytes_frac: float = 0.9
    pass_bytes_frac: float = 0.8
    launch_s: float = 2.5e-6
    """Of a kernel, on the device."""
    issue_s: float = 14e-6
    """Of an operation, on the host: an eager step takes no less."""
    memory_gib: float = 0.0
    """Of the data sheet; 0: unknown."""
    link_bytes_per_s: float = 0.0
    """To the other devices of its machine, one way: NVLink, or PCIe where there is none."""
    network_bytes_per_s: float = 0.0
    """To other machines, one way, a device's share: an assumption, the usual card of its kind."""

    def flops_per_s(self, precision: Precision) -> float:
        """The peak of the products of a run."""
        return self.fp32_flops_per_s if precision == "fp32" else self.bf16_flops_per_s


def _reached(name: str, flops_per_s: float, bytes_per_s: float) -> Device:
    """A device whose figures are what it reaches."""
    ones = {"product_frac": 1.0, "product_bytes_frac": 1.0, "pass_bytes_frac": 1.0}
    free = {"launch_s": 0.0, "issue_s": 0.0}
    return Device(name, flops_per_s, flops_per_s, flops_per_s, bytes_per_s, **ones, **free)


_NVLINK_4, _NVLINK_3, _PCIE_5, _PCIE_4 = 450e9, 300e9, 64e9, 32e9
"""Bytes a second, one way: half of what data sheets give for both."""


def _around(memory_gib: float, link_bytes_per_s: float, network_gbps: float) -> dict[str, float]:
    """What a device has and what it hangs on."""
    return {
        "memory_gib": memory_gib,
        "link_bytes_per_s": link_bytes_per_s,
        "network_bytes_per_s": network_gbps * 1e9 / 8,
    }


DEVICES = {
    device.name: device
    for device in (
        # Vendors' data sheets: dense bf16, TF32, fp32; memory's bytes a second, its GiB, links.
        # Devices whose sheets disagree are left out. Behind the links, Gb/s a device to the
        # network: as the vendor's own machines have them (400, 200), else one card of 100.
        Device("a100-40g", 312e12, 156e12, 19.5e12, 1.555e12, **_around(40, _NVLINK_3, 200)),
        Device("a100-80g", 312e12, 156e12, 19.5e12, 2.039e12, **_around(80, _NVLINK_3, 200)),
        Device("a100-80g-pcie", 312e12, 156e12, 19.5e12, 1.935e12, **_around(80, _PCIE_4, 100)),
        Device("h100", 989e12, 494e12, 67e12, 3.35e12, **_around(80, _NVLINK_4, 400)),
        Device("h100-pcie", 756e12, 378e12, 51e12, 2.0e12, **_around(80, _PCIE_5, 100)),
        Device("h100-nvl", 835e12, 417e12, 60e12, 3.9e12, **_around(94, _PCIE_5, 100)),
        Device("h200", 989e12, 494e12, 67e12, 4.8e12, **_around(141, _NVLINK_4, 400)),
        Device("l40s", 362e12, 183e12, 91.6e12, 0.864e12, **_around(48, _PCIE_4, 100)),
        Device("l4", 121e12, 60e12, 30.3e12, 0.3e12, **_around(24, _PCIE_4, 100)),
        Device("rtx-3090", 71e12, 35.6e12, 35.6e12, 0.936e12, **_around(24, _PCIE_4, 100)),
        Device("rtx-4090", 165e12, 82.6e12, 82.6e12, 1.008e12, **_around(24, _PCIE_4, 100)),
        Device("rtx-5090", 209.5e12, 104.8e12, 104.8e12, 1.792e12, **_around(32, _PCIE_5, 100)),
        # Two cores with AVX-512, fp32: what benchmarks/block_time.py reaches at full rank.
        _reached("cpu", 0.3e12, 20e9),
    )
}
_BY_VENDORS_NAME = {
    "NVIDIA A100-PCIE-40GB": "a100-40g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g-pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}
"""The whole name, as the driver gives it: a laptop's or a slice of one is another device."""


def device(text: str) -> Device:
    """A device by name, or by ``FLOPS,GBPS`` that it reaches (220e12,1600).

    Raises:
        ConfigError: neither.
    """
    if text in DEVICES:
        return DEVICES[text]
    try:
        flops, gigabytes = (float(word) for word in text.split(","))
    except ValueError:
        flops = gigabytes = 0.0
    if not (0 < flops < math.inf and 0 < gigabytes < math.inf):
        raise ConfigError(
            f"--device {text!r} is unknown; take {', '.join(DEVICES)}, or FLOPS,GBPS that it "
            "reaches, such as 220e12,1600"
        )
    return _reached(text, flops, gigabytes * 1e9)


def is_gpu(on: Device) -> bool:
    """Whether it is one of the GPUs above; a roofline in figures is no one's."""
    return on.name in DEVICES and on.name != "cpu"


def device_of(kind: str, name: str) -> Device | None:
    """The entry of a device that is there, by torch's kind (cpu, cuda) and the vendor's name; None
    where it is unknown: its time is then not foreseen."""
    if kind == "cpu":
        return DEVICES["cpu"]
    known = _BY_VENDORS_NAME.get(name)
    return None if known is None else DEVICES[known]


def communication_bytes(work: Workload, ranks: int) -> dict[str, float]:
    """Bytes that one rank sends in one optimizer step, by kind of parallelism over ``ranks``.

    ``data``: gradients all-reduced in a ring, 2 (n - 1)/n of them. ``sharded``: weights gathered
    as they are stored, those of the blocks for the forward and again for the backward pass of every
    micro-batch, the others once; gradients scattered every micro-batch, (n - 1)/n each.
    ``pipeline``: what crosses one boundary between stages, the widest, all micro-batches, once a
    pass (``boundary_passes``). With a carry from block to block that is the stream and what blocks
    hand on (6 h + 2 f wide for CR-Net where keys are not grouped, eq. 48's "communication
    dimension"), else the stream; left out where there are fewer blocks than ranks.
    ``tensor``: ``tensor_bytes``, all-reduced in a ring; left out where a model cannot be so split.
    """
    if ranks < 2:
        return {}
    micro_batch, gradients = work.micro_batch, work.gradient_bytes
    share, num_micro = (ranks - 1) / ranks, work.num_micro_batches
    gathered = num_micro * sum(gathered_bytes(work.spec.tensors, work.update).values())
    found = {
        "data": 2 * share * gradients,
        "sharded": share * (gathered + num_micro * gradients),
    }
    if ranks <= work.spec.num_layers:
        stages = cut(work.spec, ranks, micro_batch.length)
        boundaries = [
            boundary_passes(work, stage.bottom)
            * num_micro
            * boundary_bytes(micro_batch, stage.bottom)
            for stage in stages[1:]
        ]
        found["pipeline, a boundary"] = max(boundaries)
        found["pipeline, all boundaries"] = sum(boundaries)
    if not list(parts_problems(work.spec, ranks)):
        found["tensor"] = 2 * share * tensor_bytes(work)
    return found


def gathered_bytes(tensors: Mapping[str, TensorSpec], update: Bf16Update | None) -> dict[str, int]:
    """Bytes of the weights that ``--parallel.shard`` gathers for one micro-batch, ``forward`` and
    ``backward``: as they are stored (autocast comes after), embedding and head only once, for
    fully_shard keeps what is outside the blocks until the backward pass is over."""
    item = 4 if update is None else 2
    sizes = {name: it.num_items * it.item_bytes(item) for name, it in tensors.items()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("model.layers."))
    return {"forward": sum(sizes.values()), "backward": blocks}


def tensor_bytes(work: Workload) -> int:
    """Bytes that are summed between the processes of ``--parallel.tensor`` in one optimizer step,
    whatever their number.

    Every micro-batch, of every block: in the forward pass of o and down, in the backward pass of
    the others, their bottleneck (its rank wide) or, at full rank, the output of each and the
    gradient of each input (h wide). ``block`` runs forward sums again that the backward pass reads.
    Once a step: gradients of what is whole everywhere and acts on split outputs (gains), the norm.
    """
    micro_batch, spec = work.micro_batch, work.spec
    widths = sum(summed_widths(spec, work.plan))
    crossing = work.num_micro_batches * micro_batch.rows * micro_batch.compute_bytes * widths
    summed = (spec.tensors[name] for name in spec.in_parts(0, 2).summed)
    return crossing + sum(4 * tensor.num_items for tensor in summed if tensor.trained) + 4


def summed_widths(spec: ModelSpec, plan: RecomputePlan) -> list[int]:
    """The width of each tensor that ``tensor_bytes`` counts for a micro-batch, a sum each."""
    once_more, widths = plan.policy == "block", []
    for block in spec.slots:
        inputs: dict[str, int] = {}
        for slot in block:
            position, at = spec.position_of[slot.position], spec.split_of(slot).at
            if position.split == "columns" and at == "edge":
                inputs[position.input] = slot.in_size
            else:
                width = slot.rank if at == "bottleneck" else slot.out_size
                # A whole output that only leaves the block is read by nobody in it.
                is_last = at == "edge" and slot.position == spec.architecture.writes[-1]
                repeats = once_more and position.split == "rows" and not is_last
                widths += [width] * (2 if repeats else 1)
        widths += inputs.values()
    return widths


def boundary_passes(work: Workload, bottom: int) -> int:
    """How often the boundary below block ``bottom`` is crossed: eq. 48's factor.

    Forward and backward; a third time where the outputs of one side are rebuilt from the other's,
    as ``invert`` does where the block reads the one below. ``replay`` ends a segment at every
    boundary and rebuilds from what its device has kept; ``block`` runs a block again from such
    inputs, and so does every model without carries (the footnote).
    """
    return 3 if work.plan.policy == "invert" and work.spec.reads[bottom] else 2
