"""VeLoRA: full rank, and of their inputs the maps v and down keep a few numbers a token.

``y = x W^T``; the input is cut into sub-tokens of s items, of which the backward pass gets
``z = <x_sub, d>`` alone, d one direction of norm 1 for the whole map. ``dX = dY W`` is exact,
``dW = scale dY^T xhat`` has ``xhat_sub = z d`` in the place of x: a token is ``in / s`` numbers
instead of ``in``. d is the mean of all sub-tokens of the first rows of the first batch, normalised,
and frozen: a tensor of the model, in every checkpoint. Every other map is dense. Evaluation and
generation are those of full rank.

What it saves is mainly at down: the input of v is that of q and k too, which keep it.

Source: Miles et al. 2024 (arXiv:2405.17991); released code roymiles/VeLoRA at a6415bc, whose
default ("batch_average_once") this is. Published widths of sub-tokens for v and down: 8 and 16 at
60M, 12 and 32 at 130M; scale 1 (README), 1.5 in the 60M script.

Deviation: the direction is the mean over eight rows, however they are shared by processes and
micro-batches; the released code takes the first micro-batch. It is written down in the first
checkpoint. Widths, not numbers, of sub-tokens are the options: 8 divides the
widths of every preset here but those of 1B, 13B and 70B.

Unverified: the published perplexity at sizes other than 60M, rates beyond the scripts'.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.linears import Parameterization
from crnet.linears._declarations import above_zero, dense, dense_backward, dense_work
from crnet.specs import OWN, Product, Slot, TensorSpec, Traffic, Work, in_each_way

POSITIONS = ("v", "down")
"""Whose inputs are kept as a few numbers."""


@dataclass(frozen=True, kw_only=True)
class VeLoRAOptions:
    """VeLoRA."""

    v_width: int = 8
    """Items of a sub-token of what v reads (published: 8 at 60M, 12 at 130M)."""
    down_width: int = 8
    """Items of a sub-token of what down reads (published: 16 at 60M, 32 at 130M)."""
    scale: float = 1.0
    """Of the gradients of both weights (published: 1 in the README, 1.5 in the script of 60M)."""


class VeLoRA(Parameterization):
    name = "velora"
    summary = "dense matrices; v and down keep of their inputs one number a sub-token"
    Options = VeLoRAOptions
    has_ranks = False
    looks = True
    takes_dense = True
    examples = (VeLoRAOptions(v_width=16, down_width=3, scale=1.5),)

    def problems(self, options: VeLoRAOptions, slots) -> list[str]:
        found = above_zero(
            self.name,
            v_width=options.v_width,
            down_width=options.down_width,
            scale=options.scale,
        )
        if found:
            return found
        sizes = {slot.position: slot.in_size for slot in slots if slot.position in POSITIONS}
        for position, size in sorted(sizes.items()):
            width = _width(position, options)
            if size % width:
                fits = max(each for each in range(1, min(width, size) + 1) if size % each == 0)
                found.append(
                    f"--model.velora.{position}-width {width} does not divide the {size} items "
                    f"that {position} reads; take {fits}, or another divisor of {size}"
                )
        return found

    def fixed_rank(self, layer_idx, options):
        return 0

    def tensors(self, slot: Slot, options: VeLoRAOptions) -> dict[str, TensorSpec]:
        if slot.position not in POSITIONS:
            return dense(slot)
        size = (_width(slot.position, options),)
        direction = TensorSpec(size, "values", OWN, trained=False, dtype="float32", decays=False)
        return dense(slot) | {"direction": direction}

    def work(self, slot: Slot, options: VeLoRAOptions, rows: int, item_bytes: int) -> Work:
        if slot.position not in POSITIONS:
            return dense_work(slot, rows)
        items, subs = slot.in_size * slot.out_size, slot.in_size // _width(slot.position, options)
        of_x, _ = dense_backward(slot, rows)
        width = _width(slot.position, options)
        # The direction is fp32: where products are not, each pass has its cast.
        casts = Traffic(width * (4 + item_bytes), 1) if item_bytes < 4 else Traffic()
        looked = casts + Traffic((slot.in_size + subs) * rows * item_bytes, 1)
        spread = casts + Traffic((subs * slot.out_size + items) * item_bytes + 8 * width, 2)
        return Work(
            forward_flops=2 * rows * items,
            backward_flops=2 * rows * (items + subs * slot.out_size),
            weight_items=items,
            keeps_input=False,
            kept_bytes=rows * subs * item_bytes,
            products=dense_work(slot, rows).products,
            backward_products=(of_x, Product(slot.out_size, rows, subs)),
            passes=in_each_way(looked.moved_bytes, looked.kernels),
            backward_passes=in_each_way(spread.moved_bytes, spread.kernels),
        )

    def split(self, slot: Slot, options: VeLoRAOptions) -> str:
        return "the direction of a map is the mean over its whole input"

    def events(self, step: int, options: VeLoRAOptions) -> tuple[str, ...]:
        """At 0, what was looked at becomes the direction."""
        return () if step else ("direction",)

    def from_dense(self, slot, options, weight_FD, values):
        return {**values, "weight": weight_FD}

    def initial_value(self, name, slot, options, generator):
        """A random direction, for who trains without a look at a batch."""
        import torch

        size = _width(slot.position, options)
        drawn = torch.empty(size).normal_(generator=generator(name))
        return drawn / torch.linalg.vector_norm(drawn)

    def make(self, slot: Slot, options: VeLoRAOptions):
        from crnet.linears.velora.module import PlainMap, VeLoRAMap

        tensors = self.tensors(slot, options)
        if slot.position not in POSITIONS:
            return PlainMap(tensors)
        return VeLoRAMap(tensors, options.scale)


def _width(position: str, options: VeLoRAOptions) -> int:
    return options.v_width if position == "v" else options.down_width


METHODS = [VeLoRA()]
