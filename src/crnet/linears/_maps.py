"""The base class of every map, and the maps that several parameterizations share.

Shapes: B batch, T tokens, D input width, F output width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from crnet.kernels.carried import known_dense, low_rank, up_project
from crnet.kernels.partial import PartialSum, left
from crnet.kernels.precision import cast
from crnet.specs import Forget, TensorSpec

Known = tuple[Tensor, Tensor]
"""(bottleneck, output) of a map whose forward has been computed before."""

DTYPES = {"float32": torch.float32, "int32": torch.int32, "model": None}


def dtype_of(spec: TensorSpec, dtype: torch.dtype) -> torch.dtype:
    """Of a tensor, where the run's weights have ``dtype``. fp32 is the least: fp64 in fp64 runs."""
    own = DTYPES[spec.dtype]
    if own is None or not own.is_floating_point:
        return own or dtype
    return torch.promote_types(own, dtype)


class LinearMap(nn.Module):
    """A map of one position. Its parameters are registered from their declarations.

    For recomputation it comes apart: ``down_project`` is the narrowest tensor that the output
    follows from without x, ``up_project`` that output, bit for bit, and ``run(known)`` makes the
    node of the graph once both are known (``comes_apart``). A map that does not say so keeps its
    output and runs once more.
    """

    hands: Literal["output", "bottleneck"] = "output"
    """What later blocks read of it (``specs.Read.of``)."""
    comes_apart: bool = False
    """Whether ``run`` makes its node from bottleneck and output alone; a map that hands on its
    bottleneck has to, or it is refused under replay."""
    carry_dtype: torch.dtype | None = None
    """Of the output, where it is not the compute dtype."""
    sums: PartialSum | None = None
    """Set from outside where this is a part of a map: what is added up with the other parts, where
    the method says (``specs.Split.at``)."""
    bias: nn.Parameter | None
    """Of the position, where it has one: added by the block, never by the map."""

    def __init__(self, tensors: Mapping[str, TensorSpec]):
        super().__init__()
        for name, spec in tensors.items():
            empty = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
            self.register_parameter(name, nn.Parameter(empty, requires_grad=spec.trained))
        if "bias" not in tensors:
            self.register_parameter("bias", None)

    def forward(
        self, x_BTD: Tensor, carry: Tensor | None, known: Known | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the output (B, T, F) and what later blocks may read of it.

        ``known``: of a recomputation, which calls the module too: its backward hooks see the same.
        """
        return self.run(x_BTD, carry, known)

    def run(
        self, x_BTD: Tensor, carry: Tensor | None, known: Known | None
    ) -> tuple[Tensor, Tensor]:
        """``forward``; with ``known``, the same node of the graph without its products."""
        raise NotImplementedError

    def down_project(self, x_BTD: Tensor, carry: Tensor | None) -> Tensor:
        """The bottleneck. Called without gradients."""
        output, _ = self.run(x_BTD, carry, None)
        return output

    def up_project(self, bottleneck: Tensor, carry: Tensor | None) -> Tensor:
        """The output of a bottleneck, the bits of ``forward``. Called without gradients."""
        return bottleneck

    def carry_from(self, output_BTF: Tensor, bottleneck: Tensor) -> Tensor:
        """The carry, from the output and the bottleneck: for recompute invert."""
        raise NotImplementedError

    def gain(self) -> Tensor:
        """The factor of the carry that ``carry_from`` divides by, shape (1,), no gradient."""
        raise NotImplementedError

    def weight_for_dtype(self) -> Tensor:
        """A parameter that products read."""
        return next(p for p in self.parameters() if p.is_floating_point())

    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """Carry out an event in place, the parameters whole and in fp32 or their own dtype.

        ``generator`` is seeded by the run, the map's full name and the step. Returns what the
        optimizer is to forget.
        """
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The matrix (F, D) that the map multiplies with, fp32; without the carry."""
        raise NotImplementedError


class DenseMap(LinearMap):
    """``y = x W^T``, ``weight`` (F, D)."""

    comes_apart = True
    weight: nn.Parameter

    def run(self, x_BTD, carry, known):
        if known:
            output = known_dense(x_BTD, self.weight, known[1])
        else:
            output = nn.functional.linear(*cast(x_BTD, self.weight))
            if self.sums:
                output = left(output, self.sums.group)
        return output, output

    def dense_weight(self) -> Tensor:
        return self.weight.detach().float()


class LowRankMap(LinearMap):
    """``y = (x A) B``, A (D, R), B (R, F)."""

    comes_apart = True
    A: nn.Parameter
    B: nn.Parameter

    def run(self, x_BTD, carry, known):
        output = low_rank(x_BTD, self.A, self.B, known, self.sums)
        return output, output

    def down_project(self, x_BTD, carry):
        return x_times(x_BTD, self.A, self.sums)

    def up_project(self, bottleneck, carry):
        return up_project(bottleneck, self.B)

    def dense_weight(self) -> Tensor:
        return (self.A.detach().float() @ self.B.detach().float()).T


def x_times(x_BTD: Tensor, a_DR: Tensor, sums: PartialSum | None = None) -> Tensor:
    """``x A`` in the compute dtype, of all parts of the map. Called without gradients."""
    x_BTD, a_DR = cast(x_BTD, a_DR)
    z_BTR = x_BTD @ a_DR
    return z_BTR if sums is None else sums.forward(z_BTR)


def spectral_factor(
    name: str, in_size: int, rank: int, out_size: int, std: float, generator: Generator
) -> Tensor:
    """Factor ``A`` (in, rank) or ``B`` (rank, out) of the best rank-R approximation of a Gaussian
    matrix of standard deviation ``std``, its singular values split evenly. Cost: one SVD."""
    dense_DF = torch.empty(in_size, out_size).normal_(0, std, generator=generator)
    left, values, right = torch.linalg.svd(dense_DF, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root if name == "A" else root[:, None] * right[:rank]
