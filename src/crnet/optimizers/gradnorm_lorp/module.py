"""GradNormLoRP's step. Shapes: M, N sides of a matrix, R rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crnet.errors import ConfigError
from crnet.optimizers._norms import norm_of
from crnet.optimizers._subspace.module import SubspaceAdam, add_back
from crnet.optimizers._torch import adam_


class NormalisedAdam(SubspaceAdam):
    """State as of ``SubspaceAdam``, and of a dense matrix, in fp32, one number a row: ``norm``,
    that of v, and the moments of the lengths, ``length_avg`` and ``length_avg_sq``.

    Raises:
        ConfigError: at the first step, a row of a dense matrix is zero.
    Cost of a step beside GaLore's: about six passes over the matrix, and a copy of the gradient.
    """

    def _step_matrix(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        g_MN = parameter.grad
        assert g_MN is not None
        length_M1 = norm_of(parameter, 1)
        if "norm" not in state:
            _begin(name, length_M1, state)
        along_M1 = (g_MN * parameter).sum(1, keepdim=True, dtype=length_M1.dtype) / length_M1
        ratio_M1 = state["norm"][:, None] / length_M1
        of_v_MN = g_MN.addcmul(parameter, (along_M1 / length_M1).to(g_MN.dtype), value=-1)
        of_v_MN.div_(ratio_M1.to(g_MN.dtype))
        p_RN, r = self._projected(name, of_v_MN, state)
        negative_u = self._direction(parameter, r, state)
        rate = self._rate(group["lr"], state["step"])
        adam_(
            length_M1[:, 0],
            along_M1[:, 0].contiguous(),
            state["length_avg"],
            state["length_avg_sq"],
            rate=rate,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.eps,
            step=math.inf,
        )
        if rate == 0:
            return
        parameter.mul_(ratio_M1.to(g_MN.dtype))  # v, for a moment
        add_back(parameter, negative_u, p_RN, 1.0, rate * self.options.scale)
        norm_M1 = norm_of(parameter, 1)
        kept = 1 - group["lr"] * group["weight_decay"]
        parameter.mul_((length_M1 / norm_M1 * kept).to(g_MN.dtype))
        state["norm"] = norm_M1[:, 0].clone()


def _begin(name: str, length_M1: Tensor, state: dict[str, Any]) -> None:
    """v is W, and the moments of the lengths are 0."""
    if not bool((length_M1 > 0).all()):
        raise ConfigError(
            f"{name} has a row of zeros, and --optimizer.name gradnorm-lorp trains the direction "
            "of every row; take other initial values, or --optimizer.name galore"
        )
    state["norm"] = length_M1[:, 0].clone()
    state["length_avg"] = torch.zeros_like(state["norm"])
    state["length_avg_sq"] = torch.zeros_like(state["norm"])
