"""CR-Net: from the second block on, a map adds a low-rank increment to its output one block below.

``Y_l = gain Y_{l-1} + (X_l A) B``, ``gain = sign(beta) (|beta| + eps)`` (arXiv:2509.18993, eq. 6).
The first block is full rank (table 6 measures the cost of making it low rank too).

The paper's ablations in one word each: ``--model.crnet.beta 0.5`` (figure 5, a beta that is not
trained), ``--model.crnet.first-rank 96`` (table 6), ``--model.rank s1`` (figure 4, appendix E.2.6).

A layer of experts is one operator (E.3): the maps of its experts are low rank, and its output alone
is carried, ``Y_l = gain Y_{l-1} + MoE_l(X_l)``. Of the gain's variants such a layer has none.

ResFormer, the rival in the paper's own ablation (figure 6), reads the output of the first block
instead of the block below.

Source: arXiv:2509.18993; no code of the authors could be read: a re-implementation.

Deviation: variants of ours, all off by default. With ``gain`` head or channel, the gain is
a vector over heads or columns; ``carries`` leaves some positions plain low rank;
``gain-warmup-steps`` ramps the gain from ``gain-start``; ``norm`` and ``duplicate`` make the
increment ``h(X_l A) f(B)`` with h RMSNorm and ``f(B) = B + alpha / sqrt(K) E`` (arXiv:2606.28932
stacked on eq. 6); ``refactor-every`` balances the factors by an SVD of their product, which stays
as it is (arXiv:2505.22922). A gain that the seven maps of a block share is not offered: a tensor
belongs to one map, and sharding, pipelines and export rely on it.

Unverified: rates and initial values of the variants. LOG.md compares them at a small size, by two
seeds. CR-Net with `carries` q,k,v,gate,up and `--model.embedding-lr-factor 4` is better at a small
size than the published form, by six seeds (docs/comparison.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    above_zero,
    dense,
    dense_work,
    factor_products,
    factors,
    factors_work,
    inner_passes,
    pair,
)
from crnet.specs import (
    OWN,
    Passes,
    Read,
    Slot,
    Split,
    TensorSpec,
    Traffic,
    Work,
    constant,
    in_each_way,
    normal,
)


@dataclass(frozen=True, kw_only=True)
class CRNetOptions:
    """CR-Net."""

    first_rank: int | None = None
    """Rank of the first block's maps; none: full rank, as the paper has it (table 6)."""
    restarts: str | None = None
    """Blocks, from 1, that read nothing of the one below and are as the first is: 9,17. The stage
    of a pipeline that begins there gets the stream alone; none: no block but the first."""
    beta: float | None = None
    """A beta that is not trained (figure 5); none: trained from beta-init."""
    beta_init: float = 1.0
    """Initial beta: how much of the earlier block a map starts with."""
    learnable_beta: bool = True
    """Train beta; otherwise it stays at its initial value."""
    gain: Literal["scalar", "head", "channel"] = "scalar"
    """What has a beta of its own: a map, as the paper has it; each head of q, k and v (other maps
    have one); or each column of an output."""
    carries: str | None = None
    """Positions with a carry: q,k,v,gate,up; the others are plain low rank. None: all, as the paper
    has it."""
    gain_warmup_steps: int = 0
    """Steps in which the gain goes from gain-start to that of beta, in a line."""
    gain_start: float = 0.0
    """The gain before the first step of its warm-up."""
    norm: Literal["rms", "gain"] | None = None
    """RMSNorm of the bottleneck x A, without gains or with; none: as the paper has it."""
    duplicate: float | None = None
    """alpha of repeated bottlenecks added to the increment (DLR: 1); none: no more than (x A) B."""
    refactor_every: int | None = None
    """Steps between two balancings of the factors by the SVD of their product; none: never."""
    init: Literal["balanced", "zero-b", "spectral", "orthogonal", "fans"] = "balanced"
    """Initial factors. balanced: equal Gaussians; zero-b: B at 0; spectral: truncated SVD;
    orthogonal: all singular values of the product alike; fans: Gaussians of deviation
    (rank (in + out))^(-1/4), CoLA's, larger than balanced."""
    carry_dtype: Literal["compute", "fp32"] = "compute"
    """Dtype of the outputs that travel from block to block; fp32 differs in bf16 runs."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate (appendix E.2.1)."""
    beta_lr_factor: float = 1.0
    """Learning rate of beta over the base rate."""

    @property
    def first_beta(self) -> float:
        """What beta is at first."""
        return self.beta_init if self.beta is None else self.beta

    @property
    def trains_beta(self) -> bool:
        """Whether beta is trained."""
        return self.learnable_beta and self.beta is None


@dataclass(frozen=True, kw_only=True)
class ResFormerOptions(CRNetOptions):
    """ResFormer."""


class CRNet(Parameterization):
    name = "crnet"
    summary = "output of the block below plus a low-rank increment (eq. 6)"
    Options: type | None = CRNetOptions
    pads = True
    source: Literal["below", "first"] = "below"
    examples: tuple = (
        CRNetOptions(first_rank=3, carry_dtype="fp32"),
        CRNetOptions(beta=0.5, init="spectral"),
        CRNetOptions(init="zero-b", restarts="3"),
        CRNetOptions(gain="head", norm="gain", gain_warmup_steps=8, gain_start=0.5),
        CRNetOptions(gain="channel", norm="rms", init="fans", carry_dtype="fp32", restarts="3"),
        CRNetOptions(carries="q,v,up", duplicate=1.0, refactor_every=6, init="orthogonal"),
    )
    published_ranks = {  # table 10; llama3-1b: appendix E.3; 70B: r = 0.25 h, appendix G
        "aligned-parameters": {
            (512, 8): "96x3,112x4",
            (768, 12): "192x3,224x8",
            (1024, 24): "224x15,256x8",
            (2048, 24): "448",
            (2048, 32): "448",
            (4096, 32): "896",
            (5120, 40): "1260",
            (8192, 80): "2048",
        },
        "aligned-memory": {
            (512, 8): "96x3,112x4",
            (768, 12): "192x3,256x8",
            (1024, 24): "384",
            (2048, 24): "768",
        },
        # Appendix E.2.6: a third of the blocks has a higher rank, at equal parameters.
        "s1": {(1024, 24): "256x7,192x16"},
        "s2": {(1024, 24): "192x8,256x7,192x8"},
        "s3": {(1024, 24): "192x16,256x7"},
    }

    def fixed_rank(self, layer_idx: int, options: CRNetOptions) -> int | None:
        return options.first_rank or 0 if _begins(layer_idx, options) else None

    def problems(self, options: CRNetOptions, slots) -> list[str]:
        rates = {"lr_factor": options.lr_factor, "beta_lr_factor": options.beta_lr_factor}
        found = above_zero(self.name, **rates)
        parts = (_problems_of_blocks, _problems_of_beta, _problems_of_variants, _expert_problems)
        for problems in parts:
            found += [f"--model.{self.name}.{each}" for each in problems(options, slots)]
        return found

    def tensors(self, slot: Slot, options: CRNetOptions) -> dict[str, TensorSpec]:
        if not slot.rank:
            return dense(slot)
        found = _factors(slot, options)
        if options.norm == "gain":
            found["norm"] = TensorSpec((slot.rank,), "norm", constant(1.0), decays=False)
        if not _reads(slot, options):
            return found
        found["beta"] = _beta(slot, options)
        if options.gain_warmup_steps:
            found["done"] = TensorSpec((1,), "count", constant(0.0), trained=False, dtype="float32")
        return found

    def work(self, slot: Slot, options: CRNetOptions, rows: int, item_bytes: int) -> Work:
        if not slot.rank:
            return dense_work(slot, rows)
        work = factors_work(slot, rows, item_bytes)
        if _reads(slot, options):
            carried = self.output_bytes(slot, options, item_bytes)
            kept = work.kept_bytes + _gain_bytes(slot, options)
            passes = _carry_passes(slot, options, rows, item_bytes, carried)
            work = dataclasses.replace(work, kept_bytes=kept, **passes)
        return _with_variants(work, slot, options, rows, item_bytes)

    def reads(self, slot: Slot, options: CRNetOptions) -> Read | None:
        if not _reads(slot, options):
            return None
        return Read(
            self.source,
            slot.out_size,
            item_bytes=4 if options.carry_dtype == "fp32" else None,
            inverts=self.source == "below",
            initial_gain=options.gain_start if options.gain_warmup_steps else options.first_beta,
        )

    def events(self, step: int, options: CRNetOptions) -> tuple[str, ...]:
        every = options.refactor_every
        due = {
            "warm-up": 0 < step <= options.gain_warmup_steps,
            "refactor": bool(every and step and step % every == 0),
        }
        return tuple(name for name, is_due in due.items() if is_due)

    def has_events(self, options: CRNetOptions) -> bool:
        return bool(options.gain_warmup_steps or options.refactor_every)

    def can_pad(self, options: CRNetOptions) -> bool:
        return options.duplicate is None and options.refactor_every is None

    def split(self, slot: Slot, options: CRNetOptions) -> Split | str:
        """The carry of a map is split as its output is: it never crosses."""
        if options.duplicate is not None:
            return "where an item of the bottleneck is repeated hangs on the whole width"
        if options.refactor_every is not None:
            return "balancing its factors wants whole tensors"
        if not slot.rank:
            return Split("edge")
        return Split("bottleneck", ("beta",) if _reads(slot, options) else ())

    def output_bytes(self, slot: Slot, options: CRNetOptions, item_bytes: int) -> int:
        return 4 if options.carry_dtype == "fp32" and _reads(slot, options) else item_bytes

    def initial_value(self, name, slot, options, generator):
        from crnet.linears._maps import spectral_factor
        from crnet.linears.crnet.module import orthogonal_factor

        sizes = (slot.in_size, slot.rank, slot.out_size)
        if options.init == "orthogonal":
            return orthogonal_factor(name, *sizes, slot.init_std, generator(name))
        return spectral_factor(name, *sizes, slot.init_std, generator("dense"))

    def make(self, slot: Slot, options: CRNetOptions):
        from crnet.linears._maps import DenseMap
        from crnet.linears.crnet.module import CRNetMap, inside_of

        tensors = self.tensors(slot, options)
        if not slot.rank:
            return DenseMap(tensors)
        inside = inside_of(options.norm is not None, options.duplicate)
        warm_up = options.gain_warmup_steps, options.gain_start
        return CRNetMap(tensors, options.carry_dtype, inside, warm_up)

    def operator(self) -> Parameterization:
        """Experts' maps are low rank and carry nothing; what the layer of them gives is carried
        (E.3): ``Y_l = gain Y_{l-1} + MoE_l(X_l)``."""
        from crnet.linears.crnet.operator import CarriedOutput

        return CarriedOutput(self, _beta)


def _beta(slot: Slot, options: CRNetOptions) -> TensorSpec:
    return TensorSpec(
        (_num_gains(slot, options),),
        "gain",
        constant(options.first_beta),
        trained=options.trains_beta,
        dtype="float32",
        lr_factor=options.beta_lr_factor,
        decays=False,
    )


def _restarts(options: CRNetOptions) -> list[int]:
    """Blocks, from 0. Raises ``ValueError`` where they cannot be read."""
    words = [] if options.restarts is None else options.restarts.split(",")
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise ValueError(
            f"--model.crnet.restarts {options.restarts!r} cannot be read; write 9 or 9,17,25"
        )
    return sorted({int(word) - 1 for word in words})


def _begins(layer_idx: int, options: CRNetOptions) -> bool:
    """Whether a block reads nothing of an earlier one."""
    return not layer_idx or layer_idx in _restarts(options)


def _carried(options: CRNetOptions) -> list[str] | None:
    """Positions with a carry; None: all."""
    return None if options.carries is None else options.carries.split(",")


def _reads(slot: Slot, options: CRNetOptions) -> bool:
    """Whether a map has a carry. An expert's has none: its rows are other tokens'."""
    carried = _carried(options)
    if slot.expert is not None:
        return False
    return not _begins(slot.layer_idx, options) and (carried is None or slot.position in carried)


def _num_gains(slot: Slot, options: CRNetOptions) -> int:
    if options.gain == "channel":
        return slot.out_size
    return slot.out_size // slot.head_size if options.gain == "head" and slot.head_size else 1


def _gain_bytes(slot: Slot, options: CRNetOptions) -> int:
    """What autograd keeps of a gain: a number or one a column, and how far its warm-up is."""
    wide = 1 if _num_gains(slot, options) == 1 else slot.out_size
    return 4 * (wide + (options.trains_beta and options.gain_warmup_steps > 0))


def _factors(slot: Slot, options: CRNetOptions) -> dict[str, TensorSpec]:
    if options.init == "orthogonal":
        return pair(slot, OWN, OWN, options.lr_factor)
    if options.init == "fans":  # an item of A B has standard deviation (D + F)^(-1/2)
        init = normal((slot.rank * (slot.in_size + slot.out_size)) ** -0.25)
        return pair(slot, init, init, options.lr_factor)
    return factors(slot, options.init, options.lr_factor)


def _problems_of_blocks(options: CRNetOptions, slots: Sequence[Slot]) -> Iterator[str]:
    if options.first_rank is not None and options.first_rank < 1:
        yield (
            f"first-rank is {options.first_rank}; take 1 or more, "
            "or leave it out for a full-rank first block"
        )
    if options.first_rank is not None and options.init == "zero-b":
        yield (
            "init zero-b with a first rank leaves every map of a block at "
            "zero, where no gradient passes; take balanced or spectral, or a full-rank first "
            "block"
        )
    num_layers = slots[0].num_layers if slots else 0
    if outside := [str(idx + 1) for idx in _restarts(options) if not 0 < idx < num_layers]:
        yield (
            f"restarts {options.restarts}: block {', '.join(outside)} is "
            f"not one of 2 to {num_layers}; leave it out"
        )
    known = dict.fromkeys(slot.position for slot in slots)
    if slots and (unknown := [name for name in _carried(options) or () if name not in known]):
        yield (
            f"carries {options.carries}: {', '.join(map(repr, unknown))} is no position; "
            f"known: {', '.join(known)}. Without a carry at all take lowrank"
        )


def _problems_of_beta(options: CRNetOptions, slots: Sequence[Slot]) -> Iterator[str]:
    if options.beta is not None and (options.beta_init != 1 or not options.learnable_beta):
        yield (
            f"beta {options.beta:g} is fixed and says how large: leave out beta-init and "
            "learnable-beta"
        )
    if not options.trains_beta and options.first_beta == 0:
        word = "beta-init" if options.beta is None else "beta"
        yield (
            f"{word} 0 with a fixed beta is plain low rank; "
            "take that parameterization, or another beta"
        )
    if options.gain_warmup_steps < 0:
        yield f"gain-warmup-steps is {options.gain_warmup_steps}; take 1 or more, or leave it out"
    if options.gain_start and not options.gain_warmup_steps:
        yield (
            f"gain-start {options.gain_start:g} has no effect without gain-warmup-steps; "
            "say how many"
        )


def _problems_of_variants(options: CRNetOptions, slots: Sequence[Slot]) -> Iterator[str]:
    if options.duplicate is not None and not options.duplicate > 0:
        yield f"duplicate is {options.duplicate}; it must be above zero, or leave it out"
    if options.refactor_every is not None and options.refactor_every < 1:
        yield f"refactor-every is {options.refactor_every}; take 1 or more, or leave it out"
    if options.refactor_every is not None and options.norm is not None:
        yield (
            "refactor-every turns the bottleneck, and its norm would give something else; "
            "leave out one of them"
        )


def _expert_problems(options: CRNetOptions, slots: Sequence[Slot]) -> Iterator[str]:
    """Variants of the gain: what all experts give together has one, as the paper has it."""
    usual = CRNetOptions()
    for key in ("gain", "carries", "gain_warmup_steps"):
        value = getattr(options, key)
        if value != getattr(usual, key) and any(slot.expert for slot in slots):
            yield (
                f"{key.replace('_', '-')} {value} is not there for a layer of experts, whose "
                "output has one gain; leave it out"
            )


def _carry_passes(
    slot: Slot, options: CRNetOptions, rows: int, item_bytes: int, carried: int
) -> dict[str, Any]:
    """What the carry adds to a low-rank map: ``carried`` are the bytes of its items.

    Fused, the product's accumulator starts from gain * carry, and the backward pass reads the
    gradient above and Y where the local gradient is made: no dcarry, no sum.
    """
    items = rows * slot.out_size
    size, narrow = items * carried, items * item_bytes
    shrink, product = factor_products(slot, rows)
    wide = _num_gains(slot, options) > 1
    inner = Traffic(4 * size, 3 - (carried == 4)) if wide else inner_passes(items, carried)
    warming, repeated = options.gain_warmup_steps > 0, wide and options.gain == "head"
    gain = Traffic(0, 3 + wide + 4 * warming + 2 * repeated)  # on one number, or one a column
    if same := carried == item_bytes:
        product = dataclasses.replace(product, accumulates=True)
        forward = Traffic(2 * size, 1)
    else:  # the product in the compute dtype, then added
        forward = Traffic(2 * size, 1) + Traffic(narrow + 2 * size, 1)
    cast = Traffic(0 if same else size + narrow, 0 if same else 1)
    backward = Traffic(2 * size, 1) + inner + cast
    return {
        "products": (shrink, product),
        # Inductor's addmm copies what it adds to first.
        "passes": Passes(
            gain + forward, Traffic((4 if same else 2) * size + narrow, 2), Traffic(0, 0)
        ),
        "backward_passes": Passes(
            backward, Traffic(3 * size + cast.moved_bytes, 2), Traffic(2 * size, 1)
        ),
    }


def _norm_passes(
    slot: Slot, options: CRNetOptions, rows: int, item_bytes: int, *counts: int
) -> Passes:
    """Of the norm at the bottleneck, in fp32: kernels, items read or written, and how many more of
    these its gains take. ``kernels.bottleneck``."""
    kernels, moved, of_gains = counts
    gained, is_forward = options.norm == "gain", of_gains == 2
    casts = 0 if item_bytes == 4 else 2 if is_forward else 5
    items = rows * slot.rank
    return in_each_way(
        items * (4 * (moved + of_gains * gained) + casts * (item_bytes + 4)),
        kernels + of_gains // 2 * gained + casts,
    )


def _with_variants(
    work: Work, slot: Slot, options: CRNetOptions, rows: int, item_bytes: int
) -> Work:
    """What a norm at the bottleneck and repeated bottlenecks add: passes, and room for them."""
    if options.norm is not None:
        work = dataclasses.replace(
            work,
            transient_bytes=work.transient_bytes + rows * slot.rank * item_bytes,
            passes=work.passes + _norm_passes(slot, options, rows, item_bytes, 6, 3, 2),
            # Once more for dB, and the norm's own gradients.
            backward_passes=work.backward_passes
            + _norm_passes(slot, options, rows, item_bytes, 17, 15, 8),
        )
    if options.duplicate is not None:  # B is copied, and a constant added
        size = slot.rank * slot.out_size * item_bytes
        each = in_each_way(2 * size, 2)
        work = dataclasses.replace(
            work,
            transient_bytes=work.transient_bytes + size,
            passes=work.passes + each,
            backward_passes=work.backward_passes + each,
        )
    return work


class ResFormer(CRNet):
    name = "resformer"
    summary = "output of the first block plus a low-rank increment (figure 6's rival)"
    Options = ResFormerOptions
    source = "first"
    examples = (ResFormerOptions(first_rank=3, carry_dtype="fp32", learnable_beta=False),)

    def problems(self, options: CRNetOptions, slots) -> list[str]:
        found = super().problems(options, slots)
        if options.restarts is not None:
            found.append(
                f"--model.{self.name}.restarts: every block reads the first, wherever it stands; "
                "leave it out"
            )
        return found


METHODS = [CRNet(), ResFormer()]
