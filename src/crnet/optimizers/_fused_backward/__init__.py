"""Less memory in training: each parameter is updated inside the backward pass
(``--optimizer.fused-backward``).

As soon as the gradient of a matrix is there, the optimizer's step is taken with that gradient alone
and the gradient is freed. Two factors that are stepped or decay together wait for one another.
Norms, biases and gains wait for the end of the backward pass: they take no memory to speak of, and
a bias's gradient is there before its block has been run again (``recompute``), which wants the
weights of the forward pass. Every number is the ordinary update's, to the bit: what is computed of
a parameter hangs on no other's gradient (``OptimizerMethod.build``).

Where several micro-batches add up, the last one alone updates. Then every gradient is there before
the first update, and nothing is saved.

Source: Lv et al. 2023 (arXiv:2306.09782), LOMO, for plain descent; the per-layer updates of
GaLore's released code. Deviation: those step at every micro-batch.
Refused: clipping, which needs the norm of all gradients before the first update.

No torch here: ``module`` computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from crnet.optimizers._composed import pairs_of
from crnet.optimizers._low_precision import VECTORS
from crnet.optimizers._sharing import pairs, together
from crnet.specs import TensorSpec

if TYPE_CHECKING:
    from crnet.optimizers import OptimizerMethod


def waits(spec: TensorSpec) -> bool:
    """Whether a tensor is updated after the backward pass all the same."""
    return spec.role in VECTORS


def updated_at_once(
    method: OptimizerMethod, trained: Mapping[str, TensorSpec], composed: bool
) -> list[tuple[str, ...]]:
    """What is updated inside the backward pass: full names, each alone or with its partner.

    ``composed``: products of factors decay (``--optimizer.decay composed``), so both factors must
    be as they were.
    """
    early = {name: spec for name, spec in trained.items() if not waits(spec)}
    partners = pairs_of(early) if composed else {}
    return together(early, partners | (pairs(early) if method.steps_pairs else {}))
