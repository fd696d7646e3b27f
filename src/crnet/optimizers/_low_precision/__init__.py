"""How the parameters of a bf16 run take their updates, whichever optimizer computes them.

1 has neighbours 2^-8 below and 2^-7 above it in bf16. A step of less than half of that rounds back
to where it came from, and so does a second moment's decay by 0.1%: in plain bf16 what starts at 1
stays there. Bytes of a trained item, with AdamW (weight + gradient + state):

    masters      2 + 2 + 12   an fp32 copy of everything; both moments fp32
    vectors      2 + 2 + 4    such copies of norms, biases and gains alone
    stochastic   2 + 2 + 4    as vectors; matrices and their moments are computed in fp32, then
                              rounded to one of two neighbours at random: right in the mean
    plain        2 + 2 + 4    everything to the nearest; what starts at 1 does not move

Where several micro-batches add up, gradients take 4 bytes, but for ``plain``: a sum in bf16 loses
what is small. A tensor that declares a dtype of its own is trained in it, under every choice.

No torch here: ``module`` computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from crnet.errors import ConfigError
from crnet.optimizers._sharing import stepped_at_once
from crnet.specs import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from crnet.optimizers import OptimizerMethod, Settings
    from crnet.optimizers._low_precision.module import Treatment

Bf16Update = Literal["masters", "vectors", "stochastic", "plain"]

VECTORS = ("norm", "bias", "gain")
"""Roles that have few items and may start at 1."""


def treatment(spec: TensorSpec, update: Bf16Update | None) -> Treatment:
    """How a tensor takes its updates; ``update`` is None where the run is not in bf16."""
    if update is None or update == "plain" or spec.dtype != "model":
        return "own"
    if update == "masters" or spec.role in VECTORS:
        return "master"
    return "stochastic" if update == "stochastic" else "own"


def state_bytes(
    method: OptimizerMethod,
    spec: TensorSpec,
    options: Any,
    item_bytes: int,
    update: Bf16Update | None,
) -> int:
    """Bytes of one trained tensor's state, its master among them.

    ``item_bytes``: of an item of the tensor.
    """
    if treatment(spec, update) == "master":
        return method.state_bytes(spec, options, 4) + 4 * spec.num_items
    return method.state_bytes(spec, options, item_bytes)


def gradient_item_bytes(item_bytes: int, update: Bf16Update | None, num_micro_batches: int) -> int:
    """Bytes of an item of a gradient, where an item of its tensor takes ``item_bytes``."""
    adds_up = update not in (None, "plain") and num_micro_batches > 1
    return max(item_bytes, 4) if adds_up else item_bytes


def build(
    method: OptimizerMethod,
    parameters: Mapping[str, tuple[TensorSpec, Tensor]],
    options: Any,
    settings: Settings,
    update: Bf16Update | None,
) -> Optimizer:
    """The method's optimizer of the trained parameters, whose updates are taken as ``update`` says.

    Raises:
        ConfigError: ``stochastic`` with parameters that are split over ranks, or such parameters of
            several dtypes, which FSDP2 does not take.
    """
    _refuse_mixed_shards([parameter for _, parameter in parameters.values()])
    treatments: dict[str, Treatment] = {
        name: treatment(spec, update) for name, (spec, _) in parameters.items()
    }
    if set(treatments.values()) <= {"own"}:
        return method.build(parameters, options, settings)
    from crnet.optimizers._low_precision.module import LowPrecision

    def of(stand_ins: Mapping[str, tuple[TensorSpec, Tensor]]) -> Optimizer:
        return method.build(stand_ins, options, settings)

    at_once = stepped_at_once(method, {name: spec for name, (spec, _) in parameters.items()})
    return LowPrecision(of, parameters, treatments, at_once, settings.seed)


def _refuse_mixed_shards(parameters: Sequence[Tensor]) -> None:
    if len({each.dtype for each in parameters if hasattr(each, "device_mesh")}) > 1:
        raise ConfigError(
            "FSDP2 splits parameters of one dtype, and gains are fp32 in a bf16 model; split an "
            "fp32 model with MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
        )


def widen_gradients(
    parameters: Mapping[str, tuple[TensorSpec, Tensor]],
    update: Bf16Update | None,
    num_micro_batches: int,
) -> None:
    """Let autograd add up gradients in fp32, where ``gradient_item_bytes`` says so.

    Shards are passed over: FSDP2 adds up theirs in its own ``reduce_dtype``.
    """
    import torch

    for _, parameter in parameters.values():
        size = parameter.element_size()
        is_wide = gradient_item_bytes(size, update, num_micro_batches) > size
        if is_wide and not hasattr(parameter, "device_mesh"):
            parameter.grad_dtype = torch.float32
