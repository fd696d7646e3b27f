"""How well the block below and a low-rank rest give the outputs of a map (sections 3.1, D, E.1).

Of every map, its outputs Y_l over N tokens beside those of the same map one block below, Y_(l-1):

    direct  LR_r(Y_l), the closest matrix of rank r
    eq. 3   beta Y_(l-1) + LR_r(Y_l - beta Y_(l-1))

each by its relative error, the Frobenius norm of the difference over that of Y_l (eq. 4). Nothing
has to hold all outputs: what is asked follows from Y^T Y and Y_(l-1)^T Y_l, which add up over
batches. A beta of 0 is the direct one, so the best of a grid that has 0 is never worse; what tells
something is how much better it is, and at which beta.

Shapes: B batch, T tokens, N real tokens of a batch, F output width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crnet.config.sections import DataConfig
from crnet.data.rows import IGNORED, validation_batches
from crnet.errors import ConfigError
from crnet.inference.evaluate import TOKENS_AT_ONCE, computing
from crnet.inference.load import load_model, pick_device
from crnet.inference.on_rows import rows_of
from crnet.layers.projector import with_bias
from crnet.linears._maps import LinearMap
from crnet.model.language_model import LanguageModel
from crnet.storage.checkpoint import Checkpoint

BETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 3.0, 5.0)
"""Of E.1."""
RANK_FRACS = (0.25, 0.5)
"""Ranks of E.1, as shares of the hidden size."""
FUSED = {"attn.c_attn": ("q", "k", "v")}
PLAIN = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "attn.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
"""Modules of a transformers block (LLaMA's layout, GPT-2's), and the positions that each is; of
``FUSED``, the outputs of several side by side."""


@dataclass(frozen=True)
class Observed:
    """One map of one block at one rank. Norms and products are over all tokens that were read."""

    block: int
    """2 for the second block, the first that has one below."""
    position: str
    rank: int
    direct: float
    """Relative error of the best matrix of this rank."""
    errors: dict[float, float]
    """Relative error of eq. 3 by beta."""
    beta: float
    """The best of the grid."""
    error: float
    """Of eq. 3, at that beta."""
    similarity: float
    """Cosine of Y_l and Y_(l-1) as long vectors: assumption 1's 1 - epsilon."""
    stable_rank_below: float
    """Of Y_(l-1): squared Frobenius norm over squared largest singular value (definition 1)."""
    rank_bound: float
    """Theorem 1's r_0: it promises something for smaller ranks alone; 0 where the similarity is not
    above 0."""
    beta_of_theorem: float | None
    """That the proof takes at this rank; None: the rank is not below ``rank_bound``."""
    error_of_theorem: float | None
    """Relative error of eq. 3 there; the theorem says that it is at most ``direct``."""


def observe_on(
    saved: Checkpoint, data: DataConfig, device: str, rank_fracs: Sequence[float] = RANK_FRACS
) -> list[Observed]:
    """``observe`` of a checkpoint on the validation rows of a corpus, in fp32. Arguments, errors:
    ``inference.on_rows.evaluate_on``."""
    rows, place = rows_of(saved, data), pick_device(device)
    model = load_model(saved, place)
    batch_size = max(1, TOKENS_AT_ONCE // data.sequence_length)
    with computing(model, place, "fp32"):
        batches = validation_batches(rows, batch_size, data.validation_tokens)
        return observe(model, batches, rank_fracs=rank_fracs)


def observe(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    rank_fracs: Sequence[float] = RANK_FRACS,
    betas: Sequence[float] = BETAS,
) -> list[Observed]:
    """Read text with a model, and compare every map with the one below.

    Args:
        model: the package's own, of any parameterization, or a transformers model of LLaMA's or
            GPT-2's layout. A map's bias is part of its output.
        batches: tokens and targets, int64 (B, T); tokens without a target (-100) do not count.
        rank_fracs: ranks, as shares of the hidden size.
        betas: the grid.
    Returns: one for each rank, block from the second on and position.
    Raises:
        ConfigError: a model with other blocks, or with one alone; no token; a share that is no
            rank.
    Cost: the forward passes; of each map 2 F^2 numbers in fp64, and O(F^3) for each beta.
    """
    maps, width = _maps_of(model)
    ranks = [round(frac * width) for frac in rank_fracs]
    if any(rank < 1 for rank in ranks):
        raise ConfigError(f"ranks {ranks} of width {width}: give shares that make a rank of 1")
    device = next(model.parameters()).device
    with torch.no_grad(), _listening(maps) as sums:
        for tokens_BT, targets_BT in batches:
            sums.keep = (targets_BT != IGNORED).flatten().to(device)
            _read(model, tokens_BT.to(device))
    if not sums.num_tokens:
        raise ConfigError("no token to observe; give a longer text")
    found = []
    for (block, position), outer in sums.across.items():
        here, below = sums.own[block, position], sums.own[block - 1, position]
        pair = _Pair(here, below, outer)
        found += [pair.observed(block + 1, position, rank, betas) for rank in ranks]
    return sorted(found, key=lambda each: each.rank)


def averages(found: Sequence[Observed]) -> list[dict[str, Any]]:
    """Figure 2: means over the blocks, by rank and position, and over all (``all``)."""
    groups: dict[tuple[int, str], list[Observed]] = {}
    for each in found:
        groups.setdefault((each.rank, each.position), []).append(each)
    for rank in dict.fromkeys(each.rank for each in found):
        groups[rank, "all"] = [each for each in found if each.rank == rank]
    mean = statistics.fmean
    return [
        {
            "rank": rank,
            "position": position,
            "direct": mean(each.direct for each in group),
            "error": mean(each.error for each in group),
            "beta": statistics.median(each.beta for each in group),
            "similarity": mean(each.similarity for each in group),
            "stable_rank_below": mean(each.stable_rank_below for each in group),
            "rank_bound": mean(each.rank_bound for each in group),
            "uses_below": sum(each.beta != 0 for each in group) / len(group),
        }
        for (rank, position), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _read(model: nn.Module, tokens_BT: Tensor) -> None:
    """A forward pass without the head, where it can be left out."""
    if isinstance(model, LanguageModel):
        model.hidden(tokens_BT)
    else:
        getattr(model, "base_model", model)(input_ids=tokens_BT, use_cache=False)


def _maps_of(model: nn.Module) -> tuple[list[tuple[int, tuple[str, ...], nn.Module]], int]:
    """(block, positions, module) of every map, the lowest first, and the hidden size."""
    if isinstance(model, LanguageModel):
        spec = model.spec
        slots = [slot for block in spec.slots for slot in block]
        found = [
            (slot.layer_idx, (slot.position,), model.get_submodule(spec.map_name(slot)))
            for slot in slots
        ]
        return _checked(found, model), spec.shape.hidden_size
    base: Any = getattr(model, "base_model", model)
    blocks: Iterable[Any] = getattr(base, "layers", None) or getattr(base, "h", None) or ()
    named = {**{name: (position,) for name, position in PLAIN.items()}, **FUSED}
    found = [
        (idx, named[name], module)
        for idx, block in enumerate(blocks)
        for name, module in block.named_modules()
        if name in named
    ]
    return _checked(found, model), getattr(getattr(model, "config", None), "hidden_size", 0)


def _checked(found: list[Any], model: nn.Module) -> list[Any]:
    if len({block for block, _, _ in found}) < 2:
        raise ConfigError(
            f"{type(model).__name__}: two blocks or more are compared, and their maps are looked "
            "for under the names of LLaMA's and GPT-2's; give such a model"
        )
    return found


@dataclass
class _Sums:
    """What adds up over batches, fp64, (F, F)."""

    own: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Y^T Y."""
    across: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Y_(l-1)^T Y_l."""
    below: dict[str, Tensor] = field(default_factory=dict)
    """The outputs (N, F) of the latest block of each position."""
    keep: Tensor | None = None
    """Which tokens of a batch count."""
    num_tokens: int = 0

    def add(self, block: int, position: str, y_MF: Tensor) -> None:
        """Take the outputs of a map; blocks come in order."""
        assert self.keep is not None
        y_NF = y_MF[self.keep].double()
        key = block, position
        self.own[key] = self.own.get(key, 0) + y_NF.T @ y_NF
        if block > 0:
            self.across[key] = self.across.get(key, 0) + self.below[position].T @ y_NF
        self.below[position] = y_NF
        self.num_tokens += len(y_NF)


@contextlib.contextmanager
def _listening(maps: Sequence[tuple[int, tuple[str, ...], nn.Module]]) -> Iterator[_Sums]:
    """Take the outputs of these modules as they are computed."""
    sums = _Sums()

    def take(
        block: int, positions: tuple[str, ...], module: nn.Module, _: object, output: Any
    ) -> None:
        if isinstance(module, LinearMap):
            output = with_bias(module, output[0])
        parts = output.flatten(0, -2).chunk(len(positions), dim=-1)
        for position, part in zip(positions, parts, strict=True):
            sums.add(block, position, part)

    handles = [
        module.register_forward_hook(functools.partial(take, block, positions))
        for block, positions, module in maps
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


class _Pair:
    """A map's outputs and those of the block below, by their products."""

    def __init__(self, here_FF: Tensor, below_FF: Tensor, across_FF: Tensor):
        self.here, self.below, self.across = here_FF, below_FF, across_FF
        self.size, self.size_below = here_FF.trace().item(), below_FF.trace().item()
        self.inner = across_FF.trace().item()
        self.largest_below = float(torch.linalg.eigvalsh(below_FF)[-1])
        self._squares: dict[float, Tensor] = {}

    def observed(self, block: int, position: str, rank: int, betas: Sequence[float]) -> Observed:
        """At one rank."""
        largest_below = self.largest_below
        sizes = math.sqrt(self.size * self.size_below)
        similarity = self.inner / sizes if sizes else 0.0
        stable = self.size_below / largest_below if largest_below > 0 else 0.0
        bound = max(similarity, 0.0) ** 2 * stable
        chosen = None
        if rank < bound:
            chosen = (similarity * math.sqrt(stable) - math.sqrt(rank)) * math.sqrt(
                largest_below * self.size
            )
            chosen /= self.size_below + rank * largest_below
        errors = {beta: self.error(beta, rank) for beta in betas}
        beta = min(errors, key=lambda each: (errors[each], each))
        return Observed(
            block=block,
            position=position,
            rank=rank,
            direct=self.error(0.0, rank),
            errors=errors,
            beta=beta,
            error=errors[beta],
            similarity=similarity,
            stable_rank_below=stable,
            rank_bound=bound,
            beta_of_theorem=chosen,
            error_of_theorem=None if chosen is None else self.error(chosen, rank),
        )

    def error(self, beta: float, rank: int) -> float:
        """Relative error of eq. 3: what is left of Y_l - beta Y_(l-1) beyond the rank."""
        if beta not in self._squares:
            both = self.across + self.across.T
            left = self.here - beta * both + beta**2 * self.below
            self._squares[beta] = torch.linalg.eigvalsh(left).clamp(min=0)
        squares = self._squares[beta]
        beyond = float(squares[: max(len(squares) - rank, 0)].sum())
        return math.sqrt(beyond / self.size) if self.size else 0.0


def as_rows(found: Sequence[Observed]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [dataclasses.asdict(each) for each in found]


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """``averages`` as a table."""
    lines = [
        f"{'rank':>5}  {'position':10}{'direct':>8}{'eq. 3':>8}{'beta':>7}{'similarity':>12}"
        f"{'stable rank':>13}{'bound':>8}{'beta > 0':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row['rank']:>5}  {row['position']:10}{row['direct']:>8.3f}{row['error']:>8.3f}"
            f"{row['beta']:>7.2g}{row['similarity']:>12.3f}{row['stable_rank_below']:>13.1f}"
            f"{row['rank_bound']:>8.2f}{row['uses_below']:>10.0%}"
        )
    return "\n".join(lines)
