"""LoRA-Muon: Muon's step of a product, taken by its factors, however it is divided between them.

Of a map ``A B`` of rank R, M and N the momenta of the factors' gradients, S = A'A and T = BB':

    dA = -lr/2 msign(M T^-1/2) T^-1/2            dB = -lr/2 S^-1/2 msign(S^-1/2 N)
    A <- s A + dA / s,   B <- s B + dB / s,      s = sqrt(1 - lr decay)

``msign`` brings singular values near 1, by five Newton-Schulz iterations. Each half of the step of
``A B`` has singular values near lr/2, and the matrix ``A B`` decays by ``lr decay``. A and B may be
exchanged for ``A Q`` and ``Q^-1 B``: the step of the product is the same. AdamW for what is no
pair.

Where the formula has ``T^-1/2``, the code has the inverse of the Cholesky factor of T, which
differs by a rotation that msign passes on to the other side: the step is the same, and no root is
iterated for.

Source: Cesista et al. 2026 (arXiv:2606.12921); iterations and coefficients are Jordan's (2024).
Deviation: 4 eps of the trace is added to the diagonal of S and T, so that a factor which is nearly
singular has an inverse. A factor of zeros, where the formula has none, leaves its partner in place
for that step; the first one after it is a large one, and is not damped.
Unverified: the decay of the momentum, which no text at hand names.
Refused: models without pairs.
Cost: 8 R^2 (m + n) + 74 R^3 FLOPs a pair (m, R), (R, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers._paired import PairedMethod, PairedOptions


@dataclass(frozen=True, kw_only=True)
class LoraMuonOptions(PairedOptions):
    """LoRA-Muon."""


class LoraMuon(PairedMethod):
    name = "lora-muon"
    summary = "Muon's step of a product of factors, whichever factors it has"
    Options = LoraMuonOptions
    examples = (LoraMuonOptions(momentum=0.5, adam_lr_factor=0.5),)

    def build(self, parameters, options: LoraMuonOptions, settings) -> Any:
        from crnet.optimizers.lora_muon.module import LoraMuonAndAdamW

        return LoraMuonAndAdamW(parameters, options, settings)


METHODS = [LoraMuon()]
