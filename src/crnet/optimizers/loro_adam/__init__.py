"""LORO's optimizer: Adam on the factors, and now and then a step of their product.

A map's matrix is ``W = A B`` of rank r. Most steps are Adam's, on each factor at its own rate
(``--model.linear loro`` gives r / h). Every ``exact-every`` steps both factors take one Riemannian
step on the matrices of rank r, at the base rate:

    W <- the best approximation of rank r of  W - lr P(G),   P(G) = UU'G + GVV' - UU'GVV'

U and V span the columns and the rows of W. The new factors are balanced, ``A'A = BB'``. G itself is
never made: its products with U and V follow from the factors' gradients, in whose place stand
Adam's directions. Afterwards all moments of all tensors are 0 and their counts begin anew. What is
no pair takes Adam's steps.

Adam is that of the GaLore family: ``u = M / (sqrt(S) + eps)``, the bias corrected by the rate. The
published schedule, whose restarts go with the exact steps, is ``--optimizer.schedule loro-cosine``:
``exact-every`` is its ``restart-every`` or a multiple of it.

Source: Mo et al. 2025, LORO, official code at 4da57b6. Published: lr 0.01 (1B: 0.005), exact-every
500 (1B: 200), no decay, no clipping.
Deviation: where a factor is nearly singular, what divides by less than r eps of its largest
singular value is left out of the exact step (a B of zeros divides by 0).
Refused: models without pairs. Refreshes are not staggered: the schedule restarts with all of them.
Cost: Adam's; an exact step about 10 (m + n) r^2 FLOPs in products, two QR of each side and an SVD
of a (2r, 2r) matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class LoroAdamOptions:
    """LORO's optimizer."""

    exact_every: int = 500
    """Steps from one exact step to the next; all moments begin anew after each."""


class LoroAdam(OptimizerMethod):
    name = "loro-adam"
    summary = "Adam on factors, and now and then a Riemannian step of their product (LORO)"
    Options = LoroAdamOptions
    examples = (LoroAdamOptions(exact_every=3),)
    steps_pairs = True

    def problems(self, options: LoroAdamOptions) -> list[str]:
        if options.exact_every < 1:
            flag = "--optimizer.loro-adam.exact-every"
            return [f"{flag} is {options.exact_every}; take 1 or more"]
        return []

    def restarts_every(self, options: LoroAdamOptions) -> int:
        return options.exact_every

    def state_bytes(self, spec: TensorSpec, options: LoroAdamOptions, item_bytes: int) -> int:
        return 2 * spec.num_items * item_bytes

    def whole(self, spec: TensorSpec, options: LoroAdamOptions) -> bool:
        return spec.partner is not None

    def build(self, parameters, options: LoroAdamOptions, settings) -> Any:
        from crnet.optimizers.loro_adam.module import AdamWithExactSteps

        return AdamWithExactSteps(parameters, options, settings)


METHODS = [LoroAdam()]
