"""The tables of ``docs/scale.md`` are what the declarations say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

from crnet import optimizers
from crnet.config.model_spec import model_spec
from crnet.config.presets import PRESETS
from crnet.config.sections import ParallelConfig, options_of
from crnet.cost.shared import RankBytes, bytes_of_rank
from crnet.cost.workload import resolved
from crnet.specs import Role, TensorSpec, normal

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
GIB, MIB = 2**30, 2**20
NUM_RANKS = 8


def whole_table() -> list[str]:
    lines = []
    for name in optimizers.names():
        method = optimizers.get(name)
        options = method.Options and method.Options()
        whole = {
            role: method.whole(TensorSpec((4, 4), role, normal(1.0)), options)
            for role in get_args(Role)
            if role != "index"  # not trained
        }
        sides = [", ".join(r for r in whole if whole[r] is side) or "-" for side in (True, False)]
        lines.append(f"| {name} | {' | '.join(sides)} |")
    return lines


def bytes_table() -> list[str]:
    lines = []
    for linear in ("full", "crnet"):
        run = resolved(PRESETS["llama-7b"][1])
        spec = model_spec(dataclasses.replace(run.model, linear=linear))
        for name in optimizers.names():
            section = dataclasses.replace(run.optimizer, name=name)
            assert options_of(section, name) == options_of(run.optimizer, name)

            def of(num_ranks: int, spec=spec, section=section) -> list[RankBytes]:
                parallel = ParallelConfig(shard=num_ranks)
                ranks = range(num_ranks)
                return [bytes_of_rank(spec.tensors, section, parallel, rank) for rank in ranks]

            alone, ranks = of(1), of(NUM_RANKS)
            state = max(each.held["optimizer state"] for each in ranks)
            cells = [_total(alone), _total(ranks), f"{state / GIB:.2f}"]
            cells.append(f"{max(each.largest_owned for each in ranks) / MIB:.0f}")
            lines.append(f"| {linear} | {name} | {' | '.join(cells)} |")
            total = sum(each.held["optimizer state"] for each in ranks)
            counters = 4 * NUM_RANKS * len(spec.tensors)  # every process counts what it has part of
            assert 0 <= total - alone[0].held["optimizer state"] <= counters
    return lines


def _total(ranks: list[RankBytes]) -> str:
    return f"{max(sum(each.held.values()) for each in ranks) / GIB:.2f}"


def test_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for table in (whole_table(), bytes_table()):
        assert "\n".join(table) in text, "\n".join(table)
