"""SST's map: a product with a singular value decomposition; what trains of it; its events.

With ``W = V diag(s) U`` (D, F) and dY given,

    dX = dY W^T    G = X^T dY    ds_i = v_i^T G u_i    dA = G u_i    dB = G^T v_i    i in the sample

The last two lack the factor s_i of the true gradient. A and B are what the sample of V and U is
trained as; the forward pass reads V and U, where every step's event writes them. G by U gives ds
and dA at once.

Shapes: B batch, T tokens, M = B T rows, D input width, F output width, K the smaller of these, R
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from crnet.kernels.carried import rows, unrows
from crnet.kernels.precision import cast
from crnet.linears._maps import LinearMap
from crnet.specs import Forget


class SSTMap(LinearMap):
    """``y = x V diag(s) U``; V (D, K), s (K,), U (K, F); of ``index`` (R,) A (D, R) and B (R, F).

    Args:
        builds: whether so many rows are multiplied with the matrix, and not with its factors.
        samples: in a round; then a new decomposition is taken.
    """

    comes_apart = True
    V: nn.Parameter
    s: nn.Parameter
    U: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter
    index: nn.Parameter

    def __init__(self, tensors, builds: Callable[[int], bool], samples: int):
        super().__init__(tensors)
        self.builds, self.samples = builds, samples

    def run(self, x_BTD, carry, known):
        x, v_DK, s_K, u_KF, a_DR = cast(x_BTD, self.V, self.s, self.U, self.A)
        is_built = self.builds(x[..., 0].numel())
        y_BTF = known and known[1]
        output = _Spectral.apply(x, v_DK, s_K, u_KF, a_DR, self.B, self.index, is_built, y_BTF)
        return output, output

    @torch.no_grad()
    def run_event(self, event: str, generator: Generator) -> tuple[Forget, ...]:
        """normalise: values at or above zero, vectors of length 1, written into V and U.

        sample N: other vectors train; where a round is through, of a new decomposition of the
        same matrix. The function stays.
        Numerics: in fp32 or better, then one rounding.
        """
        if event == "normalise":
            self.s.clamp_(min=0)
            self.A.copy_(normalize(_wide(self.A), dim=0))
            self.B.copy_(normalize(_wide(self.B), dim=1))
            self.V.index_copy_(1, self.index.long(), self.A)
            self.U.index_copy_(0, self.index.long(), self.B)
            return ()
        is_round = int(event.removeprefix("sample ")) % self.samples == 0
        if is_round:
            for name, value in decomposed(self._weight()).items():
                self.get_parameter(name).copy_(value)
        index = draw(self.s, len(self.index), generator)
        self.index.copy_(index)
        for name, value in picked({"V": self.V, "U": self.U}, index).items():
            self.get_parameter(name).copy_(value)
        return tuple(Forget(name, restarts=True) for name in ("A", "B", *(["s"] * is_round)))

    def _weight(self) -> Tensor:
        """(D, F), in fp32 or better."""
        return (_wide(self.V) * _wide(self.s)) @ _wide(self.U)

    def dense_weight(self) -> Tensor:
        return self._weight().T.float()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def decomposed(weight_DF: Tensor) -> dict[str, Tensor]:
    """``V`` (D, K), ``s`` (K,), falling, and ``U`` (K, F) of a matrix. Cost: an SVD."""
    v_DK, s_K, u_KF = torch.linalg.svd(weight_DF, full_matrices=False)
    return {"V": v_DK, "s": s_K, "U": u_KF}


def draw(s_K: Tensor, rank: int, generator: Generator) -> Tensor:
    """R of the K vectors, int32 on the CPU, without replacement: half uniform, half by value."""
    share_K = s_K.detach().cpu().double()
    share_K = share_K / share_K.sum().clamp(min=torch.finfo(share_K.dtype).tiny)
    chances_K = (share_K + 1 / len(share_K)) / 2
    return torch.multinomial(chances_K, rank, generator=generator).int()


def picked(parts: Mapping[str, Tensor], index_R: Tensor) -> dict[str, Tensor]:
    """``A`` (D, R) and ``B`` (R, F): those vectors of ``V`` and ``U``."""
    index = index_R.to(parts["V"].device)
    return {"A": parts["V"].index_select(1, index), "B": parts["U"].index_select(0, index)}


def times(x_MD: Tensor, left_DK: Tensor, s_K: Tensor, right_KF: Tensor, is_built: bool) -> Tensor:
    """``x (L diag(s) R)``, (M, F): by the matrix, or from factor to factor."""
    if is_built:
        return x_MD @ ((left_DK * s_K) @ right_KF)
    return ((x_MD @ left_DK) * s_K) @ right_KF


class _Spectral(torch.autograd.Function):
    """Keeps x and the weights. B is an input for its gradient alone."""

    @staticmethod
    def forward(ctx, x_BTD, v_DK, s_K, u_KF, a_DR, b_RF, index_R, is_built, y_BTF):
        if y_BTF is None:
            y_BTF = unrows(times(rows(x_BTD), v_DK, s_K, u_KF, is_built), x_BTD)
        ctx.save_for_backward(x_BTD, v_DK, s_K, u_KF, a_DR, index_R)
        ctx.is_built = is_built
        return y_BTF

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTF):
        x_BTD, v_DK, s_K, u_KF, a_DR, index_R = ctx.saved_tensors
        dy_MF, (wants_x, _, wants_s, _, wants_a, wants_b) = rows(dy_BTF), ctx.needs_input_grad[:6]
        dx_BTD = ds_K = da_DR = db_RF = None
        if wants_x:
            dx_BTD = unrows(times(dy_MF, u_KF.T, s_K, v_DK.T, ctx.is_built), x_BTD)
        if wants_s or wants_a or wants_b:
            dweight_DF = rows(x_BTD).T @ dy_MF
            along_DK = dweight_DF @ u_KF.T
            ds_K = (v_DK * along_DK).sum(0)
            da_DR = along_DK.index_select(1, index_R)
            db_RF = a_DR.T @ dweight_DF
        return dx_BTD, None, ds_K, None, da_DR, db_RF, None, None, None
