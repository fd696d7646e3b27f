"""Weight decay of what two factors make, not of the factors: ``--optimizer.decay composed``.

The decoupled gradient of ``(decay / 2) |A B|^2``, from the factors as they are before the step:

    A <- A - lr decay A (B B^T)        B <- B - lr decay (A^T A) B

It shrinks what the map is, whatever share of it each factor has; ordinary decay of both shrinks
``|A|^2 + |B|^2``, twice the nuclear norm of the product at its least, which favours lower ranks.
``A B`` is never made: both are products with a Gram matrix (rank, rank).

Source: Khodak et al. 2021 (arXiv:2105.01029), Frobenius decay; that it is decoupled is ours.
No torch until a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crnet.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Parameters = Mapping[str, tuple[TensorSpec, "Tensor"]]
"""Trained ones, by full name."""


def pairs_of(trained: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The name of every first factor, and of its second one: both are trained and decay."""
    found = {}
    for name, spec in trained.items():
        if spec.role == "factor_in" and spec.partner is not None:
            other = ".".join([*name.split(".")[:-1], spec.partner])
            if other in trained and spec.decays and trained[other].decays:
                found[name] = other
    return found


def without_own_decay(parameters: Parameters) -> dict[str, tuple[TensorSpec, Tensor]]:
    """The same parameters, with pairs that the optimizer itself leaves undecayed."""
    pairs = pairs_of({name: spec for name, (spec, _) in parameters.items()})
    paired = {*pairs, *pairs.values()}
    return {
        name: (dataclasses.replace(spec, decays=False) if name in paired else spec, tensor)
        for name, (spec, tensor) in parameters.items()
    }


def tensors_of_pairs(parameters: Parameters) -> list[tuple[Tensor, Tensor]]:
    """Every pair of trained factors."""
    pairs = pairs_of({name: spec for name, (spec, _) in parameters.items()})
    return [(parameters[one][1], parameters[other][1]) for one, other in pairs.items()]


def decay(
    pairs: Sequence[tuple[Tensor, Tensor]], optimizer: Optimizer, weight_decay: float
) -> None:
    """One step's decay of every pair, in place, each factor at its group's rate.

    Of factors that are split over processes each has its rows. Every process takes part.

    Cost: 4 rank^2 (in + out) FLOPs a pair; two Gram matrices and a step of each factor for a
    moment. Split: B is gathered for a moment, and a Gram matrix added up.
    """
    import torch

    rates = {each: group["lr"] for group in optimizer.param_groups for each in group["params"]}
    with torch.no_grad():
        for a, b in pairs:
            one, rows_of_b, b_RF, gram_a, mine = _parts(a, b)
            gram_b = b_RF @ b_RF.T
            one.sub_(one @ gram_b, alpha=rates[a] * weight_decay)
            rows_of_b.sub_(gram_a[mine] @ b_RF, alpha=rates[b] * weight_decay)


def _parts(a: Any, b: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, slice]:
    """This process's rows of A and of B, the whole of B, ``A^T A``, and which rows of B they are.

    ``A^T A`` is of the factors as they are: B's step is taken after A's.
    """
    if not hasattr(a, "device_mesh"):
        return a, b, b, a.T @ a, slice(None)
    from torch import distributed as dist

    (split,) = (idx for idx, each in enumerate(a.placements) if not each.is_replicate())
    group = a.device_mesh.get_group(split)
    rows_of_a, rows_of_b = a.to_local(), b.to_local()
    gram = rows_of_a.T @ rows_of_a
    dist.all_reduce(gram, group=group)
    start = min(dist.get_rank(group) * -(-b.shape[0] // dist.get_world_size(group)), b.shape[0])
    mine = slice(start, start + rows_of_b.shape[0])
    return rows_of_a, rows_of_b, b.full_tensor(), gram, mine
