"""AdamW (Loshchilov and Hutter 2019), torch's own, fused where the device has it."""

from __future__ import annotations

from crnet.optimizers import OptimizerMethod, param_groups


class AdamW(OptimizerMethod):
    name = "adamw"
    summary = "Adam with decoupled weight decay"
    pads = True

    def whole(self, spec, options):
        return False

    def state_bytes(self, spec, options, item_bytes):
        # Two moments in the parameter's dtype, and torch's step counter, an fp32 scalar.
        return 2 * spec.num_items * item_bytes + 4

    def build(self, parameters, options, settings):
        from crnet.optimizers import _torch

        return _torch.AdamW(
            param_groups(parameters, settings),
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )


METHODS = [AdamW()]
