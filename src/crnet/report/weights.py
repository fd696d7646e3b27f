"""What a checkpoint tells: gains, singular values of maps, and a text that the model writes.

Shapes: D input width, F output width, R rank, K the smaller of a matrix's sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crnet.config.model_spec import ModelSpec
from crnet.errors import ConfigError
from crnet.inference.sampling import Sampling
from crnet.specs import Slot
from crnet.storage.checkpoint import Checkpoint

POINTS = 48
"""Singular values of a map that are handed on, evenly spaced, the first and the last among them."""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SAMPLING = Sampling(max_tokens=120, temperature=0.8, top_k=40, seed=0, stop_at_end=False)
"""Of the text: the same for every run, so that two runs of one tokenizer can be compared."""


@torch.no_grad()
def tensors_of(saved: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """``gains`` and ``spectra`` of a checkpoint's weights.

    Returns:
        ``gains``: a dict for each kind of gain (``grid``); ``spectra``: a dict for each matrix, or
        pair of factors (``spectrum``), with ``block``, ``position`` and ``tensor``. Neither has
        anything where an adapter trained: the weights are those that it began with.
    Raises:
        ConfigError: the weights are not those of the model, or not finite.
    Cost: the weights once on the CPU; of each pair O((D + F) R^2), of each matrix O(D F K).
    """
    from crnet.inference.load import check_weights, weights_dtype
    from crnet.storage.checkpoint import WEIGHTS

    if saved.is_adapter:
        return {"gains": [], "spectra": []}
    weights = saved.weights()
    dtype = weights_dtype(saved.config.train.precision)
    check_weights(spec, weights, dtype, saved.folder / WEIGHTS)
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ConfigError(
                f"{saved.folder / WEIGHTS}: {name} is not finite; take an earlier checkpoint"
            )
    spectra = []
    for slot, name, values in _spectra(spec, weights):
        where = {"block": slot.layer_idx + 1, "position": slot.position, "tensor": name}
        spectra.append(where | spectrum(values))
    return {"gains": _gains(spec, weights), "spectra": spectra}


def _gains(spec: ModelSpec, weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A grid for every kind of gain that the maps have."""
    grids: dict[str, list[list[float | None]]] = {}
    for block_idx, block in enumerate(spec.slots):
        for position_idx, slot in enumerate(block):
            for name, tensor in spec.map_tensors(slot).items():
                if tensor.role == "gain" and tensor.num_items == 1:
                    empty: list[list[float | None]] = [[None] * len(row) for row in spec.slots]
                    value = float(weights[f"{spec.map_name(slot)}.{name}"])
                    grids.setdefault(name, empty)[block_idx][position_idx] = value
    positions = [position.name for position in spec.positions]
    return [{"name": name, "positions": positions, **grid(rows)} for name, rows in grids.items()]


def grid(rows: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Values by block and position, and how they are spread.

    Returns:
        ``values``: as given; ``count``; ``quantiles``: of the absolute values, by share; their
        logarithm is what a product of gains over the blocks adds up; ``shares``: of the values in
        the intervals of the paper's table 20, the outer ones open.
    """
    found = torch.tensor([value for row in rows for value in row if value is not None]).double()
    quantiles = found.abs().quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        "values": rows,
        "count": len(found),
        "negative": int((found < 0).sum()),
        "quantiles": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
        "shares": _shares(found),
    }


TABLE_20 = (0.2, 0.6, 1.0, 1.25)
"""Bounds of the paper's table 20: [0, 0.2), [0.2, 0.6), [0.6, 1), [1, 1.25)."""


def _shares(found: Tensor) -> dict[str, float]:
    bounds = (-float("inf"), *TABLE_20, float("inf"))
    names = ["below 0.2", "0.2 to 0.6", "0.6 to 1", "1 to 1.25", "1.25 and above"]
    return {
        name: float(((found >= low) & (found < high)).double().mean())
        for name, low, high in zip(names, bounds[:-1], bounds[1:], strict=True)
    }


def _spectra(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Iterator[tuple[Slot, str, Tensor]]:
    """Singular values of every matrix and of every product of a pair of factors."""
    for block in spec.slots:
        for slot in block:
            tensors, owner = spec.map_tensors(slot), spec.map_name(slot)
            for name, tensor in tensors.items():
                weight = weights[f"{owner}.{name}"].float()
                if tensor.role == "matrix":
                    yield slot, name, torch.linalg.svdvals(weight)
                elif tensor.role == "factor_in" and tensor.partner is not None:
                    other = weights[f"{owner}.{tensor.partner}"].float()
                    yield slot, f"{name} {tensor.partner}", product_values(weight, other)


def product_values(a_DR: Tensor, b_RF: Tensor) -> Tensor:
    """Singular values of ``A B``, the largest first, (R,): those of a small square, without the
    product.

    Cost: O((D + F) R^2). Numerics: in the factors' dtype, relative to the largest.
    """
    if min(*a_DR.shape, *b_RF.shape) < a_DR.shape[1]:  # a rank above a width
        return torch.linalg.svdvals(a_DR @ b_RF)
    left, right = torch.linalg.qr(a_DR).R, torch.linalg.qr(b_RF.T).R
    return torch.linalg.svdvals(left @ right.T)


def spectrum(values: Tensor) -> dict[str, Any]:
    """What singular values, the largest first, say of a matrix.

    Returns:
        ``rank``: how many there are; ``stable_rank``: sum of their squares over the largest one's;
        ``effective_rank``: exp of the entropy of their shares of the sum; ``at``: which ones are
        handed on, from 1; ``values``: those. Of a matrix of zeros both ranks are 0.
    Source: effective rank: Roy & Vetterli 2007.
    """
    wide = values.double()
    largest, total = float(wide[0]), float(wide.sum())
    shares = wide[wide > 0] / total if total else wide[:0]
    count = len(wide)
    at = sorted({round(idx * (count - 1) / (POINTS - 1)) for idx in range(POINTS)})
    return {
        "rank": count,
        "stable_rank": float((wide / largest).square().sum()) if largest else 0.0,
        "effective_rank": float((-(shares * shares.log()).sum()).exp()) if total else 0.0,
        "at": [idx + 1 for idx in at],
        "values": [float(f"{float(wide[idx]):.5g}") for idx in at],
    }


def sample(saved: Checkpoint) -> dict[str, Any]:
    """A text that the model writes from nothing, and how it was drawn; the same every time.

    Raises:
        ConfigError: the weights are not finite, or the tokenizer is damaged.
    """

    from crnet.inference.generate import complete
    from crnet.inference.load import load_model, load_tokenizer

    model = load_model(saved)
    longest = model.max_length()
    tokens = min(SAMPLING.max_tokens, (longest or SAMPLING.max_tokens + 1) - 1)
    sampling = dataclasses.replace(SAMPLING, max_tokens=tokens)
    text = "".join(complete(model, load_tokenizer(saved), "", sampling))
    return {"text": text, **{key: getattr(sampling, key) for key in _SHOWN}}


_SHOWN = ("max_tokens", "temperature", "top_k", "seed")
