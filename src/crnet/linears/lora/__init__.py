"""A matrix plus a trained low-rank update: LoRA; ReLoRA, which merges it; SwitchLoRA, which
exchanges vectors of it; and one that all blocks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    dense,
    dense_backward,
    factors,
    pair,
    updated_work,
)
from crnet.specs import OWN, Slot, Split, TensorSpec, Work, constant, in_each_way, uniform


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """LoRA."""

    alpha: float = 32.0
    """The update is scaled by alpha over the rank."""


KEPT_FRAC = {"random": 0.001, "magnitude": 0.2, "zero": 0.0}
"""Of the published runs: the default reset, and that of the 1B model, which prunes 0.8."""


@dataclass(frozen=True, kw_only=True)
class ReLoRAOptions(LoRAOptions):
    """ReLoRA."""

    merge_every: int = 1000
    """Steps between two merges of the update into the frozen matrix (published: 5000 at 250M, 1000
    at 1B)."""
    reset_every: int = 1000
    """Steps between two resets of the optimizer's state of A and B (published: as merges)."""
    reset: Literal["random", "magnitude", "zero"] = "random"
    """random: a share of that state's items stays, drawn at random; magnitude: those of the largest
    first moment; zero: none."""
    kept_frac: float | None = None
    """That share; none: 0.001 of random, 0.2 of magnitude (published)."""
    released: bool = False
    """A begins at zero, as in the released code: before the first merge no map is trained."""

    @property
    def kept(self) -> float:
        """Share of the state that a reset keeps."""
        return KEPT_FRAC[self.reset] if self.kept_frac is None else self.kept_frac


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """Shared matrices."""

    scale: float = 1.0
    """What each block's update is multiplied with (the formula has none)."""
    init: Literal["zero-b", "balanced"] = "zero-b"
    """Initial factors. zero-b: B at 0, all blocks alike at first; balanced: equal Gaussians."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate: that of CR-Net's (appendix E.2.1)."""


@dataclass(frozen=True, kw_only=True)
class SwitchLoRAOptions(LoRAOptions):
    """SwitchLoRA."""

    alpha: float = 1.0
    """The update is scaled by alpha over the rank (published)."""
    switch_every: float = 40.0
    """Steps in which, at first, a factor exchanges as many vectors as it has (published)."""
    decay_steps: float = 4000.0
    """Steps in which the exchanges fall to 0.3 of their number (published: a tenth of the run's
    40,000)."""
    held_steps: int = 5
    """Steps for which the counterpart of an exchanged vector is held (published)."""

    def exchanges(self, step: int, rank: int) -> float:
        """Mean number of vectors that each factor exchanges after a step."""
        return rank / self.switch_every * 0.3 ** (step / self.decay_steps)


class LoRA(Parameterization):
    """LoRA: a frozen random matrix plus a trained low-rank update, from scratch.

    ``y = W0 x + (alpha / r) B A x``; W0 Gaussian and frozen, A Kaiming-uniform, B zero at first: a
    run begins as its frozen matrix, or as a full-rank run left it (``--train.init-from``).

    Source: Hu et al. 2021 (arXiv:2106.09685); as a baseline of pre-training, the code of ReLoRA at
    176f376, without its merges.

    Deviation: no dropout. PEFT's layer is the same map (a test compares them).

    Unverified: alpha and rates of the rows in the tables of GaLore and those after it.
    """

    name = "lora"
    summary = "a frozen random matrix plus a trained low-rank update"
    Options: type | None = LoRAOptions
    takes_dense = True
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options: LoRAOptions, slots) -> list[str]:
        return above_zero(self.name, alpha=options.alpha)

    def tensors(self, slot: Slot, options: LoRAOptions) -> dict[str, TensorSpec]:
        """A is Kaiming-uniform with slope sqrt(5), which is a bound of D^(-1/2)."""
        frozen = {
            name: dataclasses.replace(spec, trained=False) for name, spec in dense(slot).items()
        }
        return frozen | pair(slot, uniform(slot.in_size**-0.5), constant(0.0))

    def work(self, slot: Slot, options: Any, rows: int, item_bytes: int) -> Work:
        return updated_work(slot, rows, item_bytes)

    def from_dense(self, slot, options, weight_FD, values):
        return {**values, "weight": weight_FD}  # the update is zero

    def split(self, slot: Slot, options: LoRAOptions) -> Split | str:
        """W0 wants a sum at the edge, and that has the update's in it."""
        return Split("edge", ("A", "B"))

    def make(self, slot: Slot, options: LoRAOptions):
        from crnet.linears.lora.module import LoRAMap

        return LoRAMap(self.tensors(slot, options), options.alpha / slot.rank)


class ReLoRA(LoRA):
    """ReLoRA: LoRA whose update is merged into the frozen matrix every so many steps.

    ``y = W0 x + (alpha / r) B A x``. Every ``merge_every`` steps ``W0 <- W0 + (alpha / r) B A``, A
    is drawn anew and B is zero: the function stays, and the sum of all updates has a rank above r.
    Every ``reset_every`` steps the optimizer forgets most of its moments of A and B. Goes with
    ``--optimizer.schedule jagged-cosine``, and with a start from full-rank weights
    (``--train.init-from``), which in the paper does most of the work.

    Source: Lialin et al. 2023 (arXiv:2307.05695) and its code at 176f376.

    Deviation: A is never zero; the released code zeroes it at the start too, so that nothing is
    trained before the first merge (``released``). A reset keeps the same items of both moments;
    there each is pruned by its own magnitude. An event is due once a multiple of its steps is done,
    there one update later; under jagged-cosine both are at a rate of zero. No dropout, no trained
    scale. Merges are summed in fp32 and rounded once.

    Unverified: clocks, resets and rates of the rows in GaLore's table; no code of them is known.
    """

    name = "relora"
    summary = "LoRA that merges its update every so many steps"
    Options: type | None = ReLoRAOptions
    pads = False  # a merge draws A anew, as long as it is
    examples = (
        ReLoRAOptions(merge_every=6, reset_every=5, reset="magnitude"),
        ReLoRAOptions(merge_every=3, reset_every=4, reset="zero", released=True),
    )

    def problems(self, options: ReLoRAOptions, slots) -> list[str]:
        clocks = {"merge_every": options.merge_every, "reset_every": options.reset_every}
        found = above_zero(self.name, alpha=options.alpha, **clocks)
        flag = f"--model.relora.kept-frac {options.kept_frac}"
        if options.reset == "zero" and options.kept_frac is not None:
            found.append(f"{flag} has no effect with --model.relora.reset zero; leave it out")
        elif not 0 < options.kept < 1 and options.reset != "zero":
            found.append(
                f"{flag}: it is a share and must lie in (0, 1); to keep nothing say "
                "--model.relora.reset zero"
            )
        return found

    def tensors(self, slot: Slot, options: ReLoRAOptions) -> dict[str, TensorSpec]:
        found = super().tensors(slot, options)
        if options.released:
            found["A"] = dataclasses.replace(found["A"], init=constant(0.0))
        return found

    def events(self, step: int, options: ReLoRAOptions) -> tuple[str, ...]:
        clocks = {"merge": options.merge_every, "reset": options.reset_every}
        return tuple(name for name, every in clocks.items() if step and step % every == 0)

    def compares_moments(self, options: ReLoRAOptions) -> bool:
        return options.reset == "magnitude"

    def split(self, slot: Slot, options: ReLoRAOptions) -> Split | str:
        return "its merges and resets want whole tensors"

    def make(self, slot: Slot, options: ReLoRAOptions):
        from crnet.linears.lora.module import ReLoRAMap

        scale = options.alpha / slot.rank
        is_largest = self.compares_moments(options)
        return ReLoRAMap(self.tensors(slot, options), scale, options.kept, is_largest)


class Shared(LoRA):
    """shared: one trained matrix a position for all blocks, plus a low-rank update in each.

    `y_l = W x + scale B_l A_l x`, W the same tensor in every block l; norms are each block's own.
    The control for CR-Net: it shares W where CR-Net shares Y. Nearly CR-Net's parameters, and more
    FLOPs than full rank.

    Source: Relaxed Recursive Transformers (arXiv:2410.20672), the form in which one block is
    repeated. A re-implementation: the abstract alone was read, and no code.

    Deviation: everything is trained from random values. The paper begins with a trained model: W
    from its matrices, the factors from the singular vectors of what W lacks.

    Unverified: the rates. The factors' is CR-Net's, so that what is shared alone differs.
    """

    name = "shared"
    summary = "one trained matrix a position for all blocks, plus a low-rank update in each"
    takes_dense = False  # which block's
    Options = SharedOptions
    examples = (SharedOptions(scale=2.0, init="balanced"),)

    def problems(self, options: SharedOptions, slots) -> list[str]:
        return above_zero(self.name, scale=options.scale, lr_factor=options.lr_factor)

    def tensors(self, slot: Slot, options: SharedOptions) -> dict[str, TensorSpec]:
        return factors(slot, options.init, options.lr_factor)

    def shared(self, slot: Slot, options: SharedOptions) -> dict[str, TensorSpec]:
        return dense(slot)

    def work(self, slot: Slot, options: SharedOptions, rows: int, item_bytes: int) -> Work:
        work = super().work(slot, options, rows, item_bytes)
        matrix = slot.in_size * slot.out_size
        return dataclasses.replace(
            work,
            backward_flops=work.backward_flops + 2 * rows * matrix,
            weight_items=work.weight_items - matrix,
            shared_items=matrix,
            backward_products=(*work.backward_products, dense_backward(slot, rows)[1]),
        )

    def make(self, slot: Slot, options: SharedOptions):
        from crnet.linears.lora.module import SharedMap

        return SharedMap(self.tensors(slot, options), options.scale)


def _bounds(slot: Slot) -> dict[str, float]:
    """Of the uniform initial values of SwitchLoRA's factors: sqrt(3) standard deviations."""
    size_out, size_in, rank = slot.out_size, slot.in_size, slot.rank
    std_a = (size_out**0.5 * rank / size_in**1.5) ** 0.25
    std_b = (rank / (size_out * size_in) ** 0.5) ** 0.25
    return {name: 3**0.25 * std for name, std in (("A", std_a), ("B", std_b))}


class SwitchLoRA(LoRA):
    """SwitchLoRA: LoRA that exchanges a few vectors of its factors with a pool after every step.

    ``y = W0 x + (alpha / r) B A x``. Of each factor a vector a_i is exchanged for a candidate c of
    a pool of min(in, out), and the frozen matrix takes in the difference, ``W0 <- W0 + (alpha / r)
    b_i (a_i - c)``: the function stays, and a_i goes into the pool. Its counterpart b_i is held for
    ``held_steps`` steps, its moments zero. After step t a factor exchanges ``(r / switch_every)
    0.3^(t / decay_steps)`` vectors in the mean, a fraction at random. W0 begins so that the sum is
    a dense Gaussian matrix.

    Source: Zhou et al. 2024 (arXiv:2406.06564) and its code at f9a174e.

    Deviation: pools are frozen parameters on the device, and counted; there they are on the host.
    The vectors of a step are neighbours from a place drawn anew, there from where the last step
    ended. An optimizer counts its steps for a tensor, there for each of its vectors: after it was
    held, a vector's first steps are longer. Factors do not decay, or what is held would move.

    Unverified: everything on C4; the published runs have a budget of their own (350M: r 256, rate
    0.02, 40,000 steps).
    """

    name = "switchlora"
    summary = "LoRA that exchanges vectors of its factors with a pool after every step"
    Options = SwitchLoRAOptions
    pads = False  # vectors are drawn as long as they are
    examples = (SwitchLoRAOptions(switch_every=2, decay_steps=40, held_steps=1),)

    def problems(self, options: SwitchLoRAOptions, slots) -> list[str]:
        return above_zero(self.name, **vars(options))

    def tensors(self, slot: Slot, options: SwitchLoRAOptions) -> dict[str, TensorSpec]:
        """``pool_A`` (in, pool) and ``pool_B`` (pool, out); ``held_A`` and ``held_B`` (rank,): for
        how many steps each vector is yet held."""
        found = {
            name: dataclasses.replace(spec, init=OWN, decays=name == "weight")
            for name, spec in super().tensors(slot, options).items()
        }
        inner = min(slot.in_size, slot.out_size)
        pools = pair(dataclasses.replace(slot, rank=inner), OWN, OWN)
        for name, bound in _bounds(slot).items():
            found[f"pool_{name}"] = dataclasses.replace(
                pools[name], init=uniform(bound), trained=False, partner=None, is_cast=False
            )
            found[f"held_{name}"] = TensorSpec(
                (slot.rank,), "index", constant(0), trained=False, dtype="int32"
            )
        return found

    def work(self, slot: Slot, options: SwitchLoRAOptions, rows: int, item_bytes: int) -> Work:
        work = super().work(slot, options, rows, item_bytes)
        factors = slot.rank * (slot.in_size + slot.out_size)
        # Which vectors are free, from counts in int32 to a byte each; both gradients times that.
        held = in_each_way(2 * factors * item_bytes + 2 * 6 * slot.rank, 4)
        return dataclasses.replace(work, backward_passes=work.backward_passes + held)

    def initial_value(self, name, slot, options, generator) -> Any:
        import torch

        size = {"A": (slot.in_size, slot.rank), "B": (slot.rank, slot.out_size)}
        factor = {
            key: torch.empty(size[key]).uniform_(-bound, bound, generator=generator(key))
            for key, bound in _bounds(slot).items()
            if name in (key, "weight")
        }
        if name != "weight":
            return factor[name]
        weight_FD = torch.empty(slot.out_size, slot.in_size)
        weight_FD.normal_(0, slot.init_std, generator=generator(name))
        return self.from_dense(slot, options, weight_FD, factor)["weight"]

    def from_dense(self, slot, options, weight_FD, values):
        update_DF = options.alpha / slot.rank * (values["A"] @ values["B"])
        return {**values, "weight": weight_FD - update_DF.T}

    def events(self, step: int, options: SwitchLoRAOptions) -> tuple[str, ...]:
        return (f"switch {step}",) if step else ()

    def split(self, slot: Slot, options: SwitchLoRAOptions) -> Split | str:
        return "its exchanges want whole tensors"

    def make(self, slot: Slot, options: SwitchLoRAOptions):
        from crnet.linears.lora.switch import SwitchLoRAMap

        return SwitchLoRAMap(self.tensors(slot, options), options.alpha / slot.rank, options)


METHODS = [LoRA(), ReLoRA(), Shared(), SwitchLoRA()]
