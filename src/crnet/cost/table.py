"""What a run will cost before it starts: parameters, memory, FLOPs, communication, time, by term.

Closed forms, no torch. Parameters, weights, gradients, optimizer state, kept activations and FLOPs
are exact (``crnet profile`` measures each of them beside its prediction), peaks a few percent off,
times a roofline: what the hardware would take if nothing but its two limits held it back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from crnet import linears, optimizers
from crnet.config.sections import ModelConfig, RunConfig
from crnet.cost import activations as cost
from crnet.cost.activations import Plan, Step
from crnet.errors import ConfigError
from crnet.linears import POSITIONS

GIB = 2**30

Table = dict[str, Mapping[str, float]]
"""Section -> term -> number; the unit is in the section's name."""


@dataclass(frozen=True)
class Device:
    """A roofline: what products can reach, and how fast memory is read and written."""

    name: str
    flops_per_s: float
    bytes_per_s: float


DEVICES = {
    device.name: device
    for device in (
        # Vendors' data sheets: dense bf16 tensor products, memory bandwidth.
        Device("a100-40g", 312e12, 1.555e12),
        Device("a100-80g", 312e12, 2.039e12),
        Device("h100", 989e12, 3.35e12),
        Device("h200", 989e12, 4.8e12),
        # Two cores with AVX-512, fp32: what benchmarks/block_time.py reaches at full rank.
        Device("cpu", 0.3e12, 20e9),
    )
}


def device(text: str) -> Device:
    """A device by name, or by ``FLOPS,GBPS`` (312e12,2039).

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
            f"--device {text!r} is unknown; take {', '.join(DEVICES)}, or FLOPS,GBPS such as "
            "312e12,2039"
        )
    return Device(text, flops, gigabytes * 1e9)


# --- terms ----------------------------------------------------------------------------------------


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with a vocabulary size: the model's, or the one its tokenizer will have."""
    size = config.model.vocab_size or config.data.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def shapes(model: ModelConfig) -> dict[str, list[tuple[tuple[int, ...], bool]]]:
    """Every parameter's shape and whether it is trained, by term.

    Terms: ``embedding``, ``head``, ``norms``, each position's matrices, and what a parameterization
    keeps beside matrices under its own name in the plural (``betas``).
    """
    assert model.vocab_size, "the vocabulary size is resolved before parameters are counted"
    method = linears.get(model.linear)
    options = getattr(model, model.linear, None)
    table = (model.vocab_size, model.hidden_size)
    norms = [((model.hidden_size,), True)] * (2 * model.num_layers + 1)
    found: dict[str, list[tuple[tuple[int, ...], bool]]] = {
        "embedding": [(table, True)],
        "head": [] if model.tie_embeddings else [(table, True)],
        "norms": norms,
        **{position: [] for position in POSITIONS},
    }
    for slot in linears.slots(model):
        trained = method.groups(slot, options)
        for name, shape in method.shapes(slot).items():
            term = slot.position if len(shape) > 1 else f"{name}s"
            found.setdefault(term, []).append((shape, name in trained))
    return found


def num_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters by term (``shapes``) and their ``total``."""
    counts = {
        term: sum(math.prod(shape) for shape, _ in its)
        for term, its in shapes(resolved(config).model).items()
    }
    return counts | {"total": sum(counts.values())}


def state_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes of ``weights``, ``gradients`` and ``optimizer state`` between two steps."""
    item = 2 if config.train.precision == "bf16" else 4
    method = optimizers.get(config.optimizer.name)
    every = [it for its in shapes(resolved(config).model).values() for it in its]
    return {
        "weights": item * sum(math.prod(shape) for shape, _ in every),
        "gradients": item * sum(math.prod(shape) for shape, trained in every if trained),
        "optimizer state": sum(
            method.state_bytes(shape, item) for shape, trained in every if trained
        ),
    }


def step_of(config: RunConfig) -> Step:
    """A micro-batch of the run."""
    return cost.step_of(resolved(config))


def policies(config: RunConfig) -> dict[str, Plan]:
    """Every recompute policy that the parameterization can have, with its usual plan; the
    configured one as configured."""
    step = step_of(config)
    usual = {
        "none": Plan(),
        "block": Plan("block"),
        "replay": Plan("replay", cost.least_peak(step)),
    }
    if step.carry == "below":
        usual["invert"] = Plan("invert", cost.published_layers(len(step.layers)))
    if config.train.recompute == "auto" or config.train.recompute not in usual:
        return usual
    return usual | {config.train.recompute: cost.plan(resolved(config))}


def peak_bytes(config: RunConfig) -> int:
    """Weights, gradients, optimizer state, and the most that activations take beside them."""
    step, plan = step_of(config), cost.plan(resolved(config))
    peak = cost.peak_activations(step, plan, cost.added_at_first(step, plan))
    return sum(state_bytes(config).values()) + peak


def step_flops(config: RunConfig, plan: Plan) -> dict[str, int]:
    """FLOPs of one optimizer step, all micro-batches: products, 2 an item.

    ``attention`` is a part of ``blocks`` and counts every pair of tokens, as torch's counter does
    and the paper's eq. 10; ``attention if causal`` is what a kernel that skips masked pairs needs.
    """
    step, model = step_of(config), resolved(config).model
    num_micro = config.train.batch_size // step.sequences
    added = cost.added_at_first(step, plan)
    blocks = {key: num_micro * its for key, its in cost.block_flops(step, plan, added).items()}
    rows = num_micro * step.rows
    head = 2 * rows * model.hidden_size * (model.vocab_size or 0)
    pairs = 4 * rows * model.hidden_size * model.num_layers  # per token attended to, forward
    parts = {
        "blocks forward": blocks["forward"],
        "blocks backward": blocks["backward"],
        "recomputation": blocks["recompute"],
        "head forward": head,
        "head backward": 2 * head,
    }
    return parts | {
        "total": sum(parts.values()),
        "attention": 3 * pairs * step.length,
        "attention if causal": 3 * pairs * (step.length + 1) // 2,
    }


def communication_bytes(config: RunConfig, ranks: int) -> dict[str, float]:
    """Bytes that one rank sends in one optimizer step, by kind of parallelism over ``ranks``.

    ``data``: gradients all-reduced in a ring, 2 (n - 1)/n of them. ``sharded``: weights gathered
    for the forward and again for the backward pass of every micro-batch, gradients scattered,
    (n - 1)/n each. ``pipeline``: what crosses one boundary between blocks, all micro-batches:
    forward, backward and once more where the block above is run again (eq. 48's factor 3). With a
    carry that is the stream and seven outputs (6 h + 2 f wide where keys are not grouped, eq. 48's
    "communication dimension"), else the stream.
    """
    if ranks < 2:
        return {}
    step, model, states = step_of(config), resolved(config).model, state_bytes(config)
    num_micro = config.train.batch_size // step.sequences
    share = (ranks - 1) / ranks
    weights = states["weights"] // (2 if config.train.precision == "bf16-mixed" else 1)
    stream = step.rows * model.hidden_size * step.stream_bytes
    carry = sum(step.layers[-1].outputs) if step.layers[-1].has_carry else 0
    return {
        "data": 2 * share * states["gradients"],
        "sharded": share * (2 * num_micro * weights + states["gradients"]),
        "pipeline, a boundary": 3 * num_micro * (stream + carry),
        "pipeline, all boundaries": 3 * num_micro * (stream + carry) * (ranks - 1),
    }


def step_seconds(config: RunConfig, plan: Plan, on: Device) -> dict[str, float]:
    """Least seconds of one optimizer step on a device: a roofline, nothing overlapped.

    ``products``: FLOPs at the device's rate, or the weights read three times a micro-batch where
    that is slower. ``activations``: what autograd would keep is written once and read twice.
    ``optimizer``: weights and state read and written, gradients read.
    """
    step, states = step_of(config), state_bytes(config)
    num_micro = config.train.batch_size // step.sequences
    flops = step_flops(config, plan)["total"]
    kept = sum(cost.saved_activations(step, Plan()).values())
    moved = 2 * (states["weights"] + states["optimizer state"]) + states["gradients"]
    parts = {
        "products": max(flops / on.flops_per_s, 3 * num_micro * states["weights"] / on.bytes_per_s),
        "activations": 3 * num_micro * kept / on.bytes_per_s,
        "optimizer": moved / on.bytes_per_s,
    }
    return parts | {"total": sum(parts.values())}


# --- the whole ------------------------------------------------------------------------------------


def table(config: RunConfig, on: Device | None = None, ranks: int = 1) -> Table:
    """Everything that ``crnet cost`` shows: section -> term -> number."""
    plans, step, states = policies(config), step_of(config), state_bytes(config)
    chosen = cost.plan(resolved(config))
    added = {name: cost.added_at_first(step, it) for name, it in plans.items()}
    kept = {
        name: sum(cost.saved_activations(step, it, added[name]).values())
        for name, it in plans.items()
    }
    peaks = {name: cost.peak_activations(step, it, added[name]) for name, it in plans.items()}
    logits = step.rows * (step.model.vocab_size or 0) * 4
    found: Table = {
        "parameters": dict(num_parameters(config)),
        f"state, bytes; {config.train.precision}": states | {"total": sum(states.values())},
        f"activations kept, bytes; micro-batch {step.sequences} x {step.length}": kept,
        "activations at the peak, bytes": dict(peaks),
        "logits, bytes": {"all rows at once, never held": logits},
        "memory at the peak, bytes": {
            name: sum(states.values()) + size for name, size in peaks.items()
        },
        f"FLOPs of a step, recompute {chosen.policy}": dict(step_flops(config, chosen)),
    }
    if ranks > 1:
        found[f"communication of a step, bytes a rank, {ranks} ranks"] = communication_bytes(
            config, ranks
        )
    if on is not None:
        title = (
            f"seconds of a step on {on.name}, recompute {chosen.policy}; roofline: "
            f"{on.flops_per_s / 1e12:g} TFLOPS, {on.bytes_per_s / 1e9:g} GB/s, nothing overlapped"
        )
        found[title] = step_seconds(config, chosen, on)
    return found


def render(found: Table, measured: Table | None = None) -> str:
    """The table as text; with ``measured``, a second column and the difference."""
    lines = []
    for section, terms in found.items():
        unit = _unit(section)
        lines.append(section if unit != "GiB" else section.replace("bytes", "GiB"))
        for term, number in terms.items():
            line = f"  {term:34}{_shown(number, unit):>20}"
            if measured is not None:
                seen = measured.get(section, {}).get(term)
                if seen is not None:
                    line += f"{_shown(seen, unit):>20}{_difference(number, seen):>14}"
            lines.append(line)
    return "\n".join(lines)


def _unit(section: str) -> str:
    return "GiB" if "bytes" in section else "s" if section.startswith("seconds") else "count"


def _shown(number: float, unit: str) -> str:
    if unit == "GiB":
        return f"{number / GIB:,.4f}"
    return (
        f"{number:,.4f}" if unit == "s" else f"{number:,.0f}" if number < 1e13 else f"{number:.4e}"
    )


def _difference(predicted: float, seen: float) -> str:
    if predicted == seen:
        return "0"
    return f"{predicted / seen - 1:+.2%}" if seen else "new"
