"""Self-guided training: low rank that a dense matrix guides at first, and leaves.

``y = rho W x + (1 - rho) B (A x)``. While the guide is there all three matrices train. rho falls
from 1 to 0 by a cosine, ``rho = (1 + cos(pi t / guided_steps)) / 2`` after t steps: the first step
is the dense map's. W begins as the product A B. Once ``guided_steps`` steps are done, W is gone,
from the model and from the optimizer, and what is left is ``lowrank``: its checkpoints, its bytes,
its FLOPs, its export.

A checkpoint says in its options how many of the guided steps are done (``done-steps``), all of them
where the guide is gone; so it is evaluated, exported and fine-tuned without a word more. While the
guide is there, the map is the matrix ``rho W + (1 - rho) (A B)^T``, and that is what
``crnet export --to hf-llama`` writes.

Source: Wei et al. 2024 (arXiv:2406.16450) and its code at 5955174: formula, cosine, the initial W,
the first half of the run.

Deviation: every map of a block is guided; there those of the feed-forward alone, for attention is
dense. There W stays in the model and the optimizer to the end, unused. Left out: a guide that takes
part at random, with probability rho, to save FLOPs; the tokens of the guided steps once more at the
end; other structured matrices than low rank. The factors' rate is ours: a quarter of the base rate,
as for ``lowrank``; W has the base rate.

Unverified: everything on C4 at this package's sizes; the published runs are GPT-2's on RefinedWeb.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from crnet.linears import Parameterization
from crnet.linears._declarations import (
    TABLE_RANKS,
    above_zero,
    dense,
    dense_backward,
    factors,
    factors_work,
    pair,
    updated_work,
)
from crnet.specs import OWN, Slot, Split, TensorSpec, Work, in_each_way


@dataclass(frozen=True, kw_only=True)
class SelfGuidedOptions:
    """Self-guided training."""

    guided_steps: int | None = None
    """Steps until the guide is gone; none: the first half of the run (published). 0: there is none,
    and the map is plain low rank. Beyond the run's steps, the guide stays to its end."""
    done_steps: int = 0
    """How many of these are done: what a checkpoint says of itself. A new run has none."""
    init: Literal["balanced", "spectral"] = "balanced"
    """Initial factors, as lowrank's. balanced: equal Gaussians; spectral: truncated SVD of a dense
    initial matrix."""
    lr_factor: float = 0.25
    """Learning rate of the factors over the base rate; the guide's is the base rate."""

    @property
    def is_guided(self) -> bool:
        """Whether the guide is there."""
        return self.guided_steps is None or self.done_steps < self.guided_steps

    @property
    def rho(self) -> float:
        """Share of the guide in the output, from 1 to 0; a half, which trains every tensor, in a
        model of no run: nobody says there how long the guide is."""
        if self.guided_steps is None:
            return 0.5
        if not self.is_guided:
            return 0.0
        return (1 + math.cos(math.pi * self.done_steps / self.guided_steps)) / 2


class SelfGuided(Parameterization):
    name = "self-guided"
    summary = "low rank that a dense matrix guides in the first half of the run"
    Options = SelfGuidedOptions
    examples = (
        SelfGuidedOptions(guided_steps=8, init="spectral"),
        SelfGuidedOptions(guided_steps=0),
    )
    pads = True
    published_ranks = TABLE_RANKS

    def problems(self, options: SelfGuidedOptions, slots) -> list[str]:
        found = above_zero(self.name, lr_factor=options.lr_factor)
        guided, done = options.guided_steps, options.done_steps
        if guided is not None and guided < 0:
            found.append(
                f"--model.self-guided.guided-steps is {guided}; take 1 or more, 0 for no guide, or "
                "leave it out for the first half of the run"
            )
        elif not 0 <= done <= (guided or 0):
            found.append(
                f"--model.self-guided.done-steps is {done} of guided-steps {guided}; it is what a "
                "checkpoint says of itself: leave it out"
            )
        return found

    def options_at(
        self, step: int, num_steps: int, options: SelfGuidedOptions
    ) -> SelfGuidedOptions:
        """``guided_steps`` as a number, and how many of them are done."""
        guided = options.guided_steps
        if guided is None:
            guided = max(num_steps // 2, 1)
        done = min(options.done_steps + step, guided)
        return dataclasses.replace(options, guided_steps=guided, done_steps=done)

    def tensors(self, slot: Slot, options: SelfGuidedOptions) -> dict[str, TensorSpec]:
        if not options.is_guided:
            return factors(slot, options.init, options.lr_factor)
        # The guide begins as the product, and draws what that needs.
        guide = {name: dataclasses.replace(spec, init=OWN) for name, spec in dense(slot).items()}
        return guide | pair(slot, OWN, OWN, options.lr_factor)

    def work(self, slot: Slot, options: SelfGuidedOptions, rows: int, item_bytes: int) -> Work:
        if not options.is_guided:
            return factors_work(slot, rows, item_bytes)
        work = updated_work(slot, rows, item_bytes)
        matrix = slot.in_size * slot.out_size
        return dataclasses.replace(
            work,
            backward_flops=work.backward_flops + 2 * rows * matrix,
            backward_products=(*work.backward_products, dense_backward(slot, rows)[1]),
            # The guide's gradient times rho.
            backward_passes=work.backward_passes + in_each_way(2 * matrix * item_bytes, 1),
        )

    def has_events(self, options: SelfGuidedOptions) -> bool:
        """The guide fades and leaves between two steps."""
        return options.is_guided

    def split(self, slot: Slot, options: SelfGuidedOptions) -> Split | str:
        if options.is_guided:
            return "its guide leaves in mid-run, and processes have parts of it"
        return Split("bottleneck")

    def initial_value(self, name, slot, options, generator):
        from crnet.linears.self_guided.module import first_value

        return first_value(name, slot, options.init, generator)

    def make(self, slot: Slot, options: SelfGuidedOptions):
        from crnet.linears.self_guided.module import SelfGuidedMap

        return SelfGuidedMap(self.tensors(slot, options), options.rho)


METHODS = [SelfGuided()]
