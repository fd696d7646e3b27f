"""Stable-SPAM: AdamW on gradients without spikes, whose moments begin anew now and then.

Of the gradient G of each tensor, t its step:

1. AdaClip: ``T`` is the average (theta) of ``max |G|``, the bias corrected. Items above it are
   multiplied by ``T / max |G|``.
2. AdaGN: G gets the norm ``mean / (sqrt(mean square) + eps)`` of the averages (gamma1, gamma2) of
   its norm and the norm's square, the bias of both corrected.
3. MoRet: every ``reset_every`` steps both moments are 0 again.

Then AdamW.

Source: Huang et al. 2025 (arXiv:2502.17055). ``released``: as the authors' code has it. There a
step that restarts still moves by the old moments, under the bias of a first step, and only then
they are 0; and the counts of all averages begin anew with it, but the averages of 1. and 2. do not.
Deviation: with the moments AdamW's count begins anew, so that the bias is a first step's; the paper
does not say.
Cost: AdamW's and three passes; a gradient with a spike takes three more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.optimizers import OptimizerMethod
from crnet.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class StableSpamOptions:
    """Stable-SPAM."""

    gamma1: float = 0.7
    """Decay of the average of the gradient's norm."""
    gamma2: float = 0.9
    """Decay of the average of the norm's square."""
    theta: float = 0.999
    """Decay of the average of the largest item, above which items are shrunk."""
    reset_every: int = 1000
    """Steps between two restarts of the moments; 0: none."""
    released: bool = False
    """Restart as the released code does."""


class StableSpam(OptimizerMethod):
    name = "stable-spam"
    summary = "AdamW on gradients without spikes, moments that begin anew"
    Options = StableSpamOptions
    examples = (
        StableSpamOptions(reset_every=3, theta=0.9),
        StableSpamOptions(reset_every=2, released=True),
        StableSpamOptions(reset_every=0),
    )

    def problems(self, options: StableSpamOptions) -> list[str]:
        flag = "--optimizer.stable-spam"
        found = [
            f"{flag}.{name} is {getattr(options, name)}; it must lie in [0, 1)"
            for name in ("gamma1", "gamma2", "theta")
            if not 0 <= getattr(options, name) < 1
        ]
        if options.reset_every < 0:
            found.append(f"{flag}.reset-every is {options.reset_every}; take 1 or more, or 0")
        if options.released and not options.reset_every:
            found.append(f"{flag}.released has no effect without {flag}.reset-every")
        return found

    def state_bytes(self, spec: TensorSpec, options: StableSpamOptions, item_bytes: int) -> int:
        # AdamW's two moments and step counter; three averages.
        return 2 * spec.num_items * item_bytes + 4 + 3 * max(4, item_bytes)

    def whole(self, spec: TensorSpec, options: StableSpamOptions) -> bool:
        return True  # its norm and its largest item

    def build(self, parameters, options: StableSpamOptions, settings) -> Any:
        from crnet.optimizers.stable_spam.module import SpikeAwareAdamW

        return SpikeAwareAdamW(parameters, options, settings)


METHODS = [StableSpam()]
