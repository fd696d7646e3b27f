"""APOLLO's step. Shapes: M, N sides of a matrix, R rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from crnet.optimizers import Settings
from crnet.optimizers._beside import decay
from crnet.optimizers._norms import norm_of
from crnet.optimizers._projection import TINY, gaussian, is_right, limited, project, seed_of
from crnet.optimizers._subspace.module import GaloreAdam
from crnet.specs import TensorSpec


class ProjectedAdam(GaloreAdam):
    """State as of ``GaloreAdam``, and of a dense matrix ``norm`` of the last step, fp32, and
    ``projection`` where it is kept. Everything else follows from the options and the parameter's
    name. To restore it, take ``optimizers.load_state``, which leaves ``norm`` in fp32.

    Cost of a matrix's step: one product, and two passes over the gradient, one over the weight. The
    scaled gradient is never made: its norm follows from those of the gradient's rows or columns.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[TensorSpec, Tensor]],
        options: Any,
        settings: Settings,
        per_channel: bool,
    ):
        super().__init__(parameters, options, settings)
        self.per_channel = per_channel

    def _step_matrix(
        self, name: str, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        g_MN, options = parameter.grad, self.options
        assert g_MN is not None
        r = project(g_MN, self._projection(name, g_MN, state))
        negative_u = self._direction(parameter, r, state)
        side = int(is_right(tuple(g_MN.shape))) if self.per_channel else None
        scales = norm_of(negative_u, side) / (norm_of(r, side) + TINY)
        root = math.sqrt(options.scale)
        if options.scale_front:
            scales.mul_(root)
        if options.growth_limit:
            norms = norm_of(g_MN, side).mul_(scales)
            scales = limited(scales, norms, state, options.growth_limit)
        if not options.scale_front:
            scales = scales * root
        rate = self._rate(group["lr"], state["step"])
        parameter.addcmul_(g_MN, scales.to(g_MN.dtype), value=-rate)
        decay(parameter, group)

    def _projection(self, name: str, g_MN: Tensor, state: dict[str, Any]) -> Tensor:
        refresh_idx, since = divmod(state["step"] - 1, self.options.refresh_every)
        if since and "projection" in state:
            return state["projection"]
        seed = seed_of(self.settings.seed, name, refresh_idx)
        shape = tuple(g_MN.shape)
        p = gaussian(shape, self.options.rank, seed, g_MN.device, g_MN.dtype)
        if self.options.projection == "kept":
            state["projection"] = p
        return p
