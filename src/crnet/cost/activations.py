"""Closed forms: what a step keeps, needs at its peak and computes, under each recompute policy.

No tensor is made and torch is not imported. Bytes of what autograd keeps equal
``measure.saved_bytes`` exactly; FLOPs equal torch's counter exactly; the peak is a model of the
backward pass, a few percent off (tests/test_cost.py states how far).

Symbols: l is the paper's layer, 1-based; h hidden size, f feed-forward width, M = sequences x
length rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from crnet import linears
from crnet.config.check import parse_layers
from crnet.config.sections import ModelConfig, RunConfig
from crnet.errors import ConfigError
from crnet.kernels.loss_chunks import LOSS_CHUNK_ITEMS
from crnet.linears import POSITIONS

Policy = Literal["none", "block", "invert", "replay"]
Precision = Literal["fp32", "bf16-mixed", "bf16"]


@dataclass(frozen=True)
class Plan:
    """What the forward pass keeps for the backward pass (``recompute`` carries it out)."""

    policy: Policy = "none"
    kept_layers: tuple[int, ...] = ()
    """Layers (1-based) whose seven outputs are kept. invert: the set A of algorithm 1, the last
    layer always in it. replay: the tops of the segments, the last layer never needed."""
    keep_attention: bool = False
    """Keep the output of attention and its log-sum-exp instead of running attention again."""
    tolerance: float = 0.05
    """invert: largest relative error of a rebuilt output by ``invert_error``."""


@dataclass(frozen=True)
class Step:
    """The part of a training step that activations hang on."""

    model: ModelConfig
    sequences: int
    """Of a micro-batch."""
    length: int
    precision: Precision = "fp32"

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def compute_bytes(self) -> int:
        """Of an item that products read."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream_bytes(self) -> int:
        """Of an item of the residual stream: that of the embedding."""
        return 2 if self.precision == "bf16" else 4

    @cached_property
    def layers(self) -> list[_Layer]:
        slots = linears.slots(self.model)
        width = len(POSITIONS)
        return [_Layer(self, tuple(slots[at : at + width])) for at in range(0, len(slots), width)]

    @cached_property
    def below(self) -> dict[str, list[int]]:
        """Bytes in all blocks below the one at that index, by kind."""
        kinds = {
            "bottlenecks": [sum(it.bottlenecks) for it in self.layers],
            "outputs": [sum(it.outputs) for it in self.layers],
            "stream": [it.stream for it in self.layers],
            "attention": [it.mixed + it.log_sum_exp for it in self.layers],
        }
        return {name: [0, *itertools.accumulate(sizes)] for name, sizes in kinds.items()}

    @property
    def carry(self) -> str:
        return linears.get(self.model.linear).carry


class _Layer:
    """Bytes of one block's activations; seven of a kind in the order of ``POSITIONS``."""

    def __init__(self, step: Step, slots: tuple[linears.Slot, ...]):
        model, rows = step.model, step.rows
        method = linears.get(model.linear)
        options = getattr(model, model.linear, None)
        e, idx = step.compute_bytes, slots[0].layer_idx
        self.slots = slots
        self.has_carry = method.carry != "none" and idx > 0
        self.is_read = idx + 1 < model.num_layers and (
            method.carry == "below" or (method.carry == "first" and idx == 0)
        )
        """Whether a block above reads the outputs."""
        self.item_bytes = method.carry_bytes(options, e) if self.has_carry else e
        """Of an item of the outputs."""
        self.bottlenecks = [rows * method.bottleneck(slot) * e for slot in slots]
        self.outputs = [rows * slot.out_size * self.item_bytes for slot in slots]
        self.stream = rows * model.hidden_size * step.stream_bytes
        q, k, v, o, gate, up, down = slots
        self.hidden = rows * model.hidden_size * e
        self.rotated = rows * (q.out_size + k.out_size) * e
        self.mixed = rows * o.in_size * e
        self.log_sum_exp = rows * model.num_heads * 4
        self.activated = rows * down.in_size * e
        self.statistic = rows * 4
        self.consumed = rows * (v.out_size + gate.out_size + up.out_size) * e
        """The outputs that the inside keeps, in the compute dtype."""
        self.matrices = sum(method.matrix_items(slot) for slot in slots)

    @property
    def inside(self) -> int:
        """What lies between the maps: norms, rotation, attention, activation."""
        return (
            2 * (self.hidden + self.statistic)
            + self.rotated
            + self.mixed
            + self.log_sum_exp
            + self.activated
        )

    def outputs_at(self, item_bytes: int) -> int:
        """All seven outputs, were an item so wide."""
        return sum(self.outputs) // self.item_bytes * item_bytes


# --- which layers are kept ------------------------------------------------------------------------


def segments(plan: Plan, num_layers: int) -> list[tuple[int, int]]:
    """(bottom, top) of ``replay``'s segments, 0-based and half open, from the bottom up."""
    tops = sorted({*plan.kept_layers, num_layers})
    return list(zip([0, *tops], tops, strict=False))


def inverted_layers(
    plan: Plan, num_layers: int, added: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """The set A of each position (1-based): the plan's, the last layer, and what was added."""
    return {
        position: tuple(sorted({*plan.kept_layers, num_layers, *(added or {}).get(position, ())}))
        for position in POSITIONS
    }


def invert_error(gains: Sequence[float], unit: float) -> list[float]:
    """Bounds of the error of outputs rebuilt downwards by eq. 7, nearest to the kept one first.

    Args:
        gains: of the layers crossed, from the kept one down.
        unit: unit roundoff of the chain's dtype (half its epsilon).
    Returns:
        One bound a layer crossed: root mean square of the error over the largest root mean square
        among the outputs of the chain. Each crossing divides what came by the gain; what it adds
        is two roundings of its own before the division and three at the scale of the result.
    """
    error, bounds = 0.0, []
    for gain in gains:
        error = _crossed(error, gain, unit)
        bounds.append(error)
    return bounds


def _crossed(error: float, gain: float, unit: float) -> float:
    return (error + 2 * unit) / abs(gain) + 3 * unit if gain else math.inf


def guarded_layers(
    kept_layers: Sequence[int], gains: Sequence[float], unit: float, tolerance: float
) -> tuple[int, ...]:
    """The fewest layers to keep, the given ones among them, with every bound within tolerance.

    Args:
        kept_layers: 1-based; the last layer is always kept.
        gains: of layers 1 to L, at one position; the first is not read.
        unit, tolerance: ``invert_error``.
    """
    kept = {*kept_layers, len(gains)}
    bound = 0.0
    for layer in range(len(gains) - 1, 0, -1):
        bound = _crossed(bound, gains[layer], unit)  # that of the layer above: it is crossed
        if not (bound <= tolerance and math.isfinite(bound)):  # whatever the tolerance, never nan
            kept.add(layer)
        if layer in kept:
            bound = 0.0
    return tuple(sorted(kept))


def added_at_first(step: Step, plan: Plan) -> dict[str, tuple[int, ...]]:
    """What ``invert``'s guard keeps beyond the plan before the first step (``added`` below)."""
    if plan.policy != "invert":
        return {}
    model, num_layers = step.model, len(step.layers)
    gain = linears.get(model.linear).initial_gain(getattr(model, model.linear, None))
    unit = 2.0**-24 if step.layers[-1].item_bytes == 4 else 2.0**-8
    kept = guarded_layers(plan.kept_layers, [gain] * num_layers, unit, plan.tolerance)
    added = tuple(sorted({*kept} - {*plan.kept_layers, num_layers}))
    return dict.fromkeys(POSITIONS, added) if added else {}


# --- bytes that a step keeps ----------------------------------------------------------------------


def saved_activations(
    step: Step, plan: Plan, added: Mapping[str, Sequence[int]] | None = None
) -> dict[str, int]:
    """Bytes kept between forward and backward, by term; parameters not counted.

    Args:
        step: model, micro-batch, precision.
        plan: the policy.
        added: layers that ``invert`` keeps beyond the plan, by position (``Recomputation.added``).
    Returns:
        ``tokens``; ``stream`` (X; under ``none`` also the stream after attention); ``outputs``
        (Y); ``bottlenecks`` (Z = X A); ``inside`` (norms, rotation, attention, activation);
        ``casts`` (bf16 copies of weights), ``gains``, ``tables`` (rotary): where autograd keeps
        everything; ``last norm``; ``head input gradient`` and ``head weight gradient``, which the
        loss computes in the forward pass.
    Source: ``invert``'s stream, outputs and bottlenecks are eq. 38.
    """
    layers, rows, hidden = step.layers, step.rows, step.model.hidden_size
    assert step.model.vocab_size, "the vocabulary size is resolved before bytes are counted"
    terms = {
        "tokens": 8 * rows,
        "stream": 0,
        "outputs": sum(_kept_outputs(step, plan, added)),
        "bottlenecks": sum(sum(layer.bottlenecks) for layer in layers),
        "inside": 0,
        "casts": 0,
        "gains": 0,
        "tables": 0,
        "last norm": rows * (hidden * step.stream_bytes + 4),
        "head input gradient": rows * hidden * step.compute_bytes,
        "head weight gradient": step.model.vocab_size * hidden * 4,
    }
    if plan.policy == "none":
        terms["tables"] = _tables(step)
        terms["stream"] = sum(2 * layer.stream for layer in layers)
        terms["inside"] = sum(layer.inside for layer in layers)
        terms["gains"] = sum(
            len(POSITIONS) * layer.item_bytes for layer in layers if layer.has_carry
        )
        if step.precision == "bf16-mixed":
            terms["casts"] = sum(2 * layer.matrices for layer in layers)
    elif plan.policy == "replay":
        terms["stream"] = sum(layers[bottom].stream for bottom, _ in segments(plan, len(layers)))
    else:
        terms["stream"] = sum(layer.stream for layer in layers)
        if plan.policy == "block":
            terms["bottlenecks"] = 0
    if plan.keep_attention and plan.policy in ("invert", "replay"):
        terms["inside"] = sum(layer.mixed + layer.log_sum_exp for layer in layers)
    return terms


def _kept_outputs(step: Step, plan: Plan, added: Mapping[str, Sequence[int]] | None) -> list[int]:
    """Bytes of each layer's outputs that stay."""
    layers = step.layers
    if plan.policy == "none":
        return [_autograd_outputs(step, idx) for idx in range(len(layers))]
    if plan.policy == "block":
        return [sum(layer.outputs) if layer.is_read else 0 for layer in layers]
    kept: set[tuple[int, int]] = set()
    if plan.policy == "invert":
        for position, numbers in inverted_layers(plan, len(layers), added).items():
            kept |= {(number - 1, POSITIONS.index(position)) for number in numbers}
    else:
        for bottom, _ in segments(plan, len(layers)):
            if bottom and step.carry != "none":
                base = bottom - 1 if step.carry == "below" else 0
                kept |= {(base, at) for at in range(len(POSITIONS))}
        for idx, layer in enumerate(layers):
            kept |= {(idx, at) for at, size in enumerate(layer.bottlenecks) if not size}
    return [
        sum(size for at, size in enumerate(layer.outputs) if (idx, at) in kept)
        for idx, layer in enumerate(layers)
    ]


def _autograd_outputs(step: Step, idx: int) -> int:
    # An output is kept for the block that reads it, in that block's dtype, and for the inside of
    # its own block, in the compute dtype: one copy where the two agree.
    layer = step.layers[idx]
    if not layer.is_read:
        return layer.consumed
    reader_bytes = step.layers[idx + 1].item_bytes
    kept = layer.outputs_at(reader_bytes)
    return kept if reader_bytes == step.compute_bytes else kept + layer.consumed


def _tables(step: Step) -> int:
    half = step.model.hidden_size // step.model.num_heads // 2
    if step.precision == "fp32":  # looked at where they are cached, for a power of 2 of tokens
        return 2 * 4 * half * (1 << max(step.length - 1, 1).bit_length())
    return 2 * step.compute_bytes * half * step.length * len(step.layers)


# --- FLOPs ----------------------------------------------------------------------------------------


def block_flops(
    step: Step, plan: Plan, added: Mapping[str, Sequence[int]] | None = None
) -> dict[str, int]:
    """FLOPs of the blocks in one micro-batch: ``forward``, ``backward``, ``recompute``.

    Products only, 2 an item; attention in full, not causal, as torch's counter has it under the
    MATH backend. Source: eq. 39 is ``invert``'s recompute.
    """
    layers, rows, model = step.layers, step.rows, step.model
    products = sum(2 * rows * layer.matrices for layer in layers)
    attention = 4 * rows * step.length * layers[0].slots[3].in_size * model.num_layers
    repeated = 0
    if plan.policy == "block":
        repeated = products + attention
        # torch's checkpointing stops where the last tensor was kept: a dense map's is its input.
        method = linears.get(model.linear)
        repeated -= sum(
            2 * rows * method.matrix_items(layer.slots[-1])
            for layer in layers
            if not layer.bottlenecks[-1]
        )
    elif plan.policy != "none":
        repeated = _rebuilt_products(step, plan, added)
        repeated += 0 if plan.keep_attention else attention
    return {
        "forward": products + attention,
        "backward": 2 * (products + attention),
        "recompute": repeated,
    }


def _rebuilt_products(step: Step, plan: Plan, added: Mapping[str, Sequence[int]] | None) -> int:
    """FLOPs of the products Z B that rebuild outputs."""
    layers = step.layers
    method = linears.get(step.model.linear)
    if plan.policy == "invert":
        kept = inverted_layers(plan, len(layers), added)
        wanted = [
            (idx, at)
            for idx in range(1, len(layers))
            for at, position in enumerate(POSITIONS)
            if idx not in kept[position]
        ]
    else:
        spared = {top - 1 for _, top in segments(plan, len(layers))[:-1]}
        spared = spared if step.carry == "below" else set()
        wanted = [
            (idx, at)
            for idx in range(len(layers))
            for at in range(len(POSITIONS))
            if idx not in spared
        ]
    slots = [layers[idx].slots[at] for idx, at in wanted]
    return sum(2 * step.rows * method.bottleneck(slot) * slot.out_size for slot in slots)


# --- the peak -------------------------------------------------------------------------------------


def peak_activations(
    step: Step, plan: Plan, added: Mapping[str, Sequence[int]] | None = None
) -> int:
    """Most bytes of activations and their gradients alive at once in a micro-batch.

    The head's weight gradient is counted, those of other parameters are not. Three moments can be
    the fullest. At the end of the forward pass the last outputs are still there. In the loss
    everything kept is there, and the head's gradients twice (summed chunk by chunk, then scaled).
    And in the backward pass of a block: see ``_gradients``.
    """
    kept = _kept_outputs(step, plan, added)
    saved = saved_activations(step, plan, added)
    total = sum(saved.values())
    forward = total - saved["head input gradient"] - saved["head weight gradient"]
    forward += sum(step.layers[-1].outputs) - kept[-1]
    cached = 0
    if plan.policy == "block" and step.precision == "bf16-mixed":
        # Autocast keeps its casts of dense weights to the end of the forward pass.
        cached = sum(2 * it.matrices for it in step.layers if not sum(it.bottlenecks))
    backward = 8 * step.rows + max(
        _alive(step, plan, kept, idx) + _gradients(step, plan, layer)
        for idx, layer in enumerate(step.layers)
    )
    return max(cached + max(forward, total + _loss_bytes(step)), backward)


def _loss_bytes(step: Step) -> int:
    """What the loss needs for a moment, beyond the two gradients that it keeps."""
    hidden, vocab_size = step.model.hidden_size, step.model.vocab_size or 0
    backward = step.rows * hidden * step.compute_bytes + vocab_size * hidden * 4
    if step.precision == "fp32" and step.rows >= hidden and vocab_size > hidden:
        return backward  # torch's own loss, whose chunks are small (kernels.loss)
    # A chunk's logits and probabilities in fp32, their slope in bf16, its share of the gradient.
    chunk = min(step.rows, max(1, LOSS_CHUNK_ITEMS // vocab_size)) * vocab_size
    chunk *= 4 + 4 + (step.compute_bytes if step.compute_bytes < 4 else 0)
    casts = 2 * vocab_size * hidden if step.precision == "bf16-mixed" else 0
    return max(backward, chunk + vocab_size * hidden * step.compute_bytes + casts)


def _gradients(step: Step, plan: Plan, layer: _Layer) -> int:
    """While a block goes backward, beyond what is kept and rebuilt."""
    q, k, v, o, gate, up, down = layer.outputs
    come = q + k + v + o + gate + up if layer.is_read else 0
    leaves = down if layer.has_carry else 0
    # The backward of the activation; that of ``down`` has freed its input and its bottleneck.
    swiglu = come + leaves + 4 * layer.activated - layer.activated - layer.bottlenecks[-1]
    # The end of the second run, where all seven outputs are still there.
    again = come + (down if layer.is_read else 0) + sum(layer.outputs)
    again -= layer.consumed if layer.item_bytes == step.compute_bytes else 0
    return layer.stream + max(swiglu, 0 if plan.policy == "none" else again)


def _alive(step: Step, plan: Plan, kept: Sequence[int], idx: int) -> int:
    """Bytes kept and rebuilt while block ``idx`` goes backward."""
    layers, layer = step.layers, step.layers[idx]
    casts = [2 * it.matrices if step.precision == "bf16-mixed" else 0 for it in layers]
    if plan.policy == "none":
        return sum(kept[: idx + 1]) + sum(
            2 * it.stream + it.inside + sum(it.bottlenecks) + cast
            for it, cast in zip(layers[: idx + 1], casts, strict=False)
        )
    # Of the block itself: its inside, run again, and the stream after attention.
    if plan.policy == "block":
        alive = layer.inside + layer.stream + sum(layer.bottlenecks) + layer.consumed + casts[idx]
        return alive + sum(it.stream for it in layers[: idx + 1]) + sum(kept[:idx])
    if plan.policy == "invert":
        below = sum(layers[idx - 1].outputs) if idx else 0
        alive = _alive_above(step, plan, idx, idx) + sum(it.stream for it in layers[:idx])
        return alive + below + sum(kept[: max(idx - 1, 0)])
    parts = segments(plan, len(layers))
    bottom = next(bottom for bottom, top in parts if bottom <= idx < top)
    below = sum(layers[first].stream for first, _ in parts if first < bottom) + sum(kept[:bottom])
    return _alive_above(step, plan, bottom, idx) + below


def _alive_above(step: Step, plan: Plan, bottom: int, idx: int) -> int:
    """Of a segment rebuilt from ``bottom`` up, all bottlenecks below included, while block ``idx``
    goes backward; without the streams and outputs kept below it."""
    layer, below = step.layers[idx], step.below
    alive = layer.inside + layer.stream + layer.consumed
    alive += 2 * layer.matrices if step.precision == "bf16-mixed" else 0
    alive += below["bottlenecks"][idx + 1]
    if plan.keep_attention:
        alive += below["attention"][idx]
    alive += below["stream"][idx + 1] - below["stream"][bottom]
    return alive + below["outputs"][idx] - below["outputs"][bottom]


# --- the choice of a plan -------------------------------------------------------------------------


def step_of(config: RunConfig) -> Step:
    """A micro-batch of a run; ``model.vocab_size`` is known."""
    train = config.train
    return Step(
        config.model,
        train.micro_batch_size or train.batch_size,
        config.data.sequence_length,
        train.precision,
    )


def published_layers(num_layers: int) -> tuple[int, ...]:
    """The paper's set A without the last layer, which is always in it: every 8th."""
    return tuple(range(8, num_layers, 8))


def plan(config: RunConfig) -> Plan:
    """The plan that a configuration asks for; ``model.vocab_size`` is known.

    Raises:
        ConfigError: no policy fits ``train.activation_budget_gib``; names the least it would take.
    """
    train, step = config.train, step_of(config)
    keep_attention = train.recompute_attention == "keep"
    if train.recompute == "auto":
        return cheapest(step, (train.activation_budget_gib or 0) * 2**30, train.invert_tolerance)
    if train.recompute in ("none", "block"):
        return Plan(train.recompute)
    num_layers = config.model.num_layers
    if train.recompute_layers is not None:
        layers = parse_layers(train.recompute_layers, num_layers)
    elif train.recompute == "invert":
        layers = published_layers(num_layers)
    else:
        layers = least_peak(step, keep_attention)
    layers = tuple(layer for layer in layers if layer < num_layers)
    return Plan(train.recompute, layers, keep_attention, train.invert_tolerance)


def cheapest(step: Step, budget_bytes: float, tolerance: float = 0.05) -> Plan:
    """The plan with the fewest FLOPs to repeat whose ``peak_activations`` fit the budget.

    ``invert`` is a candidate where its outputs travel in fp32: in bf16 what its guard keeps hangs
    on the betas of every step. (In fp32 too, once gains fall below about 0.2: the guard keeps more,
    writes it down, and the budget may be passed.) Raises ``ConfigError`` where nothing fits.
    """
    candidates = [Plan(), Plan("block")]
    for keep in (True, False):
        candidates.append(Plan("replay", least_peak(step, keep), keep, tolerance))
        if step.carry == "below" and step.layers[-1].item_bytes == 4:
            layers = published_layers(len(step.layers))
            candidates.append(Plan("invert", layers, keep, tolerance))
    peaks = {it: peak_activations(step, it) for it in candidates}
    fitting = [it for it in candidates if peaks[it] <= budget_bytes]
    if not fitting:
        least = min(candidates, key=lambda it: peaks[it])
        raise ConfigError(
            f"--train.activation-budget-gib {budget_bytes / 2**30:g}: a micro-batch of "
            f"{step.sequences} x {step.length} needs {math.ceil(peaks[least] / 2**20) / 1024:.3f} "
            f"at least (--train.recompute {least.policy}); give that, or a smaller "
            "--train.micro-batch-size"
        )
    # Exact before inexact where the FLOPs are equal.
    return min(
        fitting,
        key=lambda it: (block_flops(step, it)["recompute"], it.policy == "invert", peaks[it]),
    )


def least_peak(step: Step, keep_attention: bool = False) -> tuple[int, ...]:
    """Layers (1-based) for ``replay`` to keep: the segments with the least ``peak_activations``.

    Keeping n layers' outputs costs n; a segment of k layers k more while it is rebuilt. When the
    backward pass has left a segment its outputs are free, so the segment below may be longer by
    one: k, k + 1, k + 2, ... from the top. Were outputs all there is, n segments within a peak of P
    outputs would cover about n (P - n) + n^2 / 2 layers, most for n = P: P = sqrt(2 L), against
    2 sqrt(L) with equal segments. What else a block holds is counted here, hence the search
    (dynamic programming over the number of layers and of segments below; L^2 n steps).
    """
    layers = step.layers
    num_layers = len(layers)
    one = Plan("replay", (), keep_attention)
    outputs = [sum(layer.outputs) for layer in layers]
    alone = [
        sum(it for it, z in zip(a.outputs, a.bottlenecks, strict=True) if not z) for a in layers
    ]
    # The peak of blocks bottom..top-1 as one segment, without what lies kept below it. The fullest
    # block is the topmost or the one under it, whose outputs have gradients from above.
    spans: dict[tuple[int, int], int] = {}
    for top in range(1, num_layers + 1):
        for bottom in range(top):
            spans[bottom, top] = max(
                _alive_above(step, one, bottom, idx) + _gradients(step, one, layers[idx])
                for idx in range(max(bottom, top - 2), top)
            )
    best: dict[tuple[int, int], tuple[int, int, tuple[int, ...]]] = {(0, 0): (0, 0, ())}
    for top in range(1, num_layers + 1):
        for count in range(1, min(top, 2 * math.isqrt(2 * num_layers) + 2) + 1):
            found = []
            for bottom in range(count - 1, top):
                if (below := best.get((bottom, count - 1))) is None:
                    continue
                peak, kept, tops = below
                base = 0
                if bottom and step.carry != "none":
                    source = bottom - 1 if step.carry == "below" else 0
                    base = outputs[source] - alone[source]
                here = spans[bottom, top] + kept + base
                kept += base + layers[bottom].stream + sum(alone[bottom:top])
                found.append((max(peak, here), kept, (*tops, top)))
            best[top, count] = min(found)
    # Everything else that is there when the backward pass begins, twice the head's gradients.
    rest = sum(saved_activations(step, one).values()) + _loss_bytes(step)
    rest -= sum(alone) + layers[0].stream
    ends = [value for (top, _), value in best.items() if top == num_layers]
    _, _, tops = min(ends, key=lambda it: (max(it[0], it[1] + rest), it[1]))
    return tops[:-1]
