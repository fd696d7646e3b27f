"""The base class of every map, and the maps that several parameterizations share.

Shapes: B batch, T tokens, D input width, F output width, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

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


def _register(module: nn.Module, tensors: Mapping[str, TensorSpec]) -> None:
    """Give a module parameters as they are declared, not yet filled."""
    for name, spec in tensors.items():
        empty = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        module.register_parameter(name, nn.Parameter(empty, requires_grad=spec.trained))


class SharedTensors(nn.Module):
    """What the maps of one position share (``Parameterization.shared``). They ask this module and
    hold on to no tensor: sharding and loading put others in its place."""

    def __init__(self, tensors: Mapping[str, TensorSpec]):
        super().__init__()
        self.declared = dict(tensors)
        _register(self, tensors)


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
    shared: Any = None
    """The module with the tensors that the position's maps share (``SharedTensors``)."""
    bias: nn.Parameter | None
    """Of the position, where it has one: added by the block, never by the map."""

    def __init__(self, tensors: Mapping[str, TensorSpec]):
        super().__init__()
        _register(self, tensors)
        if "bias" not in tensors:
            self.register_parameter("bias", None)

    def share(self, tensors: SharedTensors) -> None:
        """Read these tensors. They stay no children of this map: the model has them, once."""
        vars(self).update(shared=tensors)

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

    def bias_to_add(self) -> Tensor | None:
        """The bias of the position, as wide as the output."""
        return self.bias

    def weight_for_dtype(self) -> Tensor:
        """A parameter that products read."""
        return next(p for p in self.parameters() if p.is_floating_point())

    def look(self, x_BTD: Tensor) -> None:
        """Note something of an input of the first batch, for an event of step 0; the same on every
        process. Called without gradients, where the method says ``looks``."""

    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """Carry out an event in place, the parameters whole and in fp32 or their own dtype.

        ``generator`` is seeded by the run, the map's full name and the step. Returns what the
        optimizer is to forget.
        """
        raise NotImplementedError

    def take(self, options: Any) -> None:
        """Go by other options of the method (``Parameterization.options_at``). Tensors that these
        do not declare are None by then."""

    def dense_weight(self) -> Tensor:
        """The matrix (F, D) that the map multiplies with, fp32; without the carry."""
        raise NotImplementedError

    def with_update(self, a_DR: Tensor, b_RF: Tensor) -> dict[str, Tensor] | None:
        """The tensors, fp32, of a map whose output has ``(x A) B`` more: of the same map where it
        has no rank, else of one whose rank is larger by that of the update. None: there is none.
        """
        return None


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

    def run_event(self, event, generator):
        return ()  # of the maps beside it

    def dense_weight(self) -> Tensor:
        return self.weight.detach().float()

    def with_update(self, a_DR, b_RF):
        return {"weight": self.weight.detach().float() + (a_DR @ b_RF).T}


class SameMap(LinearMap):
    """``y = x``: the output of an operator that nothing is added to."""

    def run(self, x_BTD, carry, known):
        return x_BTD, x_BTD


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

    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """refactor: the factors are balanced, and the product stays."""
        assert event == "refactor", event
        return refactor(self.A, self.B)

    def dense_weight(self) -> Tensor:
        return (self.A.detach().float() @ self.B.detach().float()).T

    def with_update(self, a_DR, b_RF):
        return wider_factors(self.A, self.B, a_DR, b_RF)


def x_times(x_BTD: Tensor, a_DR: Tensor, sums: PartialSum | None = None) -> Tensor:
    """``x A`` in the compute dtype, of all parts of the map. Called without gradients."""
    x_BTD, a_DR = cast(x_BTD, a_DR)
    z_BTR = x_BTD @ a_DR
    return z_BTR if sums is None else sums.forward(z_BTR)


def wider_factors(a_DR: Tensor, b_RF: Tensor, a_DS: Tensor, b_SF: Tensor) -> dict[str, Tensor]:
    """Factors ``A``, ``B`` of rank R + S, fp32, of the sum of two products."""
    a, b = torch.cat([a_DR.detach().float(), a_DS], 1), torch.cat([b_RF.detach().float(), b_SF], 0)
    return {"A": a, "B": b}


def duplicated(b_RF: Tensor, alpha: float) -> Tensor:
    """Return ``B + alpha / sqrt(K) E``, in memory of its own; ``B`` itself for alpha 0.

    ``E`` (R, F) is constant: row i is 1 in the K columns from i K on, K = ceil(F / R), and 0
    elsewhere. So ``z`` times the result is ``z B`` plus alpha / sqrt(K) times z with each of its
    items repeated K times, cut off at F. Differentiable in ``B``: E moves no gradient.

    Args:
        b_RF: the outer factor, any floating dtype.
    Returns: (R, F), dtype of ``b_RF``.
    Cost: R F items read and written. Where autograd multiplies with it, it is kept beside ``B``.
    Numerics: one rounding to the dtype of ``b_RF``.
    Source: arXiv:2606.28932, the fold ``B* = B + alpha / sqrt(K) R``.
    """
    return _Duplicated.apply(b_RF, alpha) if alpha else b_RF


class _Duplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b_RF, alpha):
        rank, out_size = b_RF.shape
        copies = -(-out_size // rank)
        whole, rest = divmod(out_size, copies)
        result_RF = b_RF.clone(memory_format=torch.contiguous_format)
        # Row i begins i F items on, its ones i K later.
        ones = result_RF.as_strided((whole, copies), (out_size + copies, 1))
        ones.add_(alpha / copies**0.5)
        if rest:
            result_RF[whole, out_size - rest :].add_(alpha / copies**0.5)
        return result_RF

    @staticmethod
    @once_differentiable
    def backward(ctx, dresult_RF):
        return dresult_RF, None


def spectral_factor(
    name: str, in_size: int, rank: int, out_size: int, std: float, generator: Generator
) -> Tensor:
    """Factor ``A`` (in, rank) or ``B`` (rank, out) of the best rank-R approximation of a Gaussian
    matrix of standard deviation ``std``, its singular values split evenly. Cost: one SVD for both,
    where they are asked for one after the other."""
    _, left, values, right = drawn_triples(in_size, out_size, std, generator.initial_seed())
    root = values[:rank].sqrt()
    return left[:, :rank] * root if name == "A" else root[:, None] * right[:rank]


@functools.lru_cache(maxsize=1)
def drawn_triples(
    in_size: int, out_size: int, std: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A Gaussian matrix (in, out) of standard deviation ``std`` and its singular triples: left
    vectors (in, k), values (k,), right vectors (k, out), k the smaller width. Not to be changed.

    Cost: one SVD; the last result stays in memory, for the other tensors of the same map.
    """
    generator = torch.Generator().manual_seed(seed)
    dense_DF = torch.empty(in_size, out_size).normal_(0, std, generator=generator)
    return dense_DF, *torch.linalg.svd(dense_DF, full_matrices=False)


@torch.no_grad()
def refactor(a_DR: Tensor, b_RF: Tensor) -> tuple[Forget, ...]:
    """Balance the factors ``A``, ``B`` of a map in place; the optimizer begins anew on both.

    Numerics: of ``refactored``, then one rounding to the dtype of each.
    """
    for factor, value in zip((a_DR, b_RF), refactored(a_DR, b_RF), strict=True):
        factor.copy_(value)
    return tuple(Forget(name, restarts=True) for name in ("A", "B"))


def refactored(a_DR: Tensor, b_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of the same product: ``A' B' = A B``, ``A'^T A' = B' B'^T``, diagonal.

    Returns: factors of the same shapes, in fp64; columns of A' fall in length.
    Cost: two QR decompositions and an SVD of R x R numbers.
    Numerics: fp64, so that what is rounded is the result alone. A direction in which the product is
        zero is zero in both factors, where no gradient passes any more.
    Source: arXiv:2505.22922.
    """
    left_DK, upper_KR = torch.linalg.qr(a_DR.detach().double())
    right_FL, lower_LR = torch.linalg.qr(b_RF.detach().double().T)
    inner_KN, values_N, inner_NL = torch.linalg.svd(upper_KR @ lower_LR.T, full_matrices=False)
    root_N = values_N.sqrt()
    a, b = (left_DK @ inner_KN) * root_N, root_N[:, None] * (inner_NL @ right_FL.T)
    missing = a_DR.shape[1] - len(values_N)  # of a rank above a width
    return nn.functional.pad(a, (0, missing)), nn.functional.pad(b, (0, 0, 0, missing))
