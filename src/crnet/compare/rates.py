"""How fast embedding and head learn beside the maps of the blocks: what rows may differ in unseen.

A rate is tuned for the whole model. Where factors take a quarter of it, its best is four times as
large, and the embedding, which takes all of it, learns four times as fast as in a full-rank model
at its own best. What that alone does has been measured: docs/comparison.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crnet.cost.workload import Workload

MAPS = ("matrix", "factor_in", "factor_out", "values")
"""Roles of the tensors of linear maps."""


def embedding_rates(work: Workload) -> tuple[float, float]:
    """The embedding's learning rate over that of a map of a block: the least and the largest.

    By the factors that tensors declare; an optimizer may have others (``adam_lr_factor``).
    """
    trained = [spec for spec in work.spec.tensors.values() if spec.trained]
    maps = [spec.lr_factor for spec in trained if spec.role in MAPS]
    outer = [spec.lr_factor for spec in trained if spec.role in ("embedding", "head")]
    if not maps or not outer:
        return 0.0, 0.0
    return min(outer) / max(maps), max(outer) / min(maps)


def in_words(rates: tuple[float, float]) -> str:
    """One number where the least is the largest."""
    least, most = rates
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def warning(rows: Mapping[str, Mapping[str, Any]], tuning: Mapping[str, Any] | None) -> str | None:
    """What is to be said where rows are not alike; None: they are, or each is tuned in that.

    Args:
        rows: by name, with ``embedding_rates``.
        tuning: the study's, as ``results`` has it.
    """
    tuned = {key.replace("-", "_") for key in (tuning or {"grid": ()})["grid"]}
    if "model.embedding_lr_factor" in tuned:
        return None
    found = {name: in_words(row["embedding_rates"]) for name, row in rows.items()}
    if len({*found.values()}) < 2:
        return None
    words = ", ".join(f"{name} {rates}" for name, rates in found.items())
    return (
        f"the embedding's rate over that of the maps is not the same: {words}; a part of what "
        "differs may be that; tune model.embedding_lr_factor too, or say so"
    )
