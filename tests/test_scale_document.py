"""The tables of ``docs/scale.md`` are what the declarations say."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest

from crnet import linears, optimizers, streams
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.presets import PRESETS
from crnet.config.sections import SIZES, ParallelConfig, RunConfig, options_of
from crnet.config.serialize import override
from crnet.cost.clock import clock_of
from crnet.cost.fleet import parse_fleet
from crnet.cost.hardware import DEVICES as HARDWARE
from crnet.cost.layout_choice import chosen, closest
from crnet.cost.layout_search import LayoutSpace
from crnet.cost.shared import RankBytes, bytes_of_rank
from crnet.cost.stage_clock import stage_seconds
from crnet.cost.stage_memory import process_bytes
from crnet.cost.stages import boundary_bytes, cut
from crnet.cost.step import step_flops
from crnet.cost.workload import resolved, workload
from crnet.errors import ConfigError
from crnet.paper.tables import PRINTED_22
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
            role: method.whole(TensorSpec((64, 64), role, normal(1.0), partner=partner), options)
            for role in get_args(Role)
            for partner in ["other" if role.startswith("factor") else None]
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
            if linear == "full" and optimizers.get(name).steps_pairs:
                continue  # refused: it has none
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


DEVICES = (8, 64, 256, 1024)
SIZES_ON_PAPER = {"1B": "llama-1b", "7B": "llama-7b", "13B": "llama-13b", "70B": "llama-70b"}


def on_paper(size: str, linear: str, number: int) -> str:
    """A line of the table "On paper": the layout that crnet plan chooses."""
    config = override(
        PRESETS[SIZES_ON_PAPER[size]][1],
        model={"linear": linear, "rank": "0.25h"},
        data={"sequence_length": 4096},
        train={"batch_size": 1024},
    )
    space = LayoutSpace(config, parse_fleet(f"{number}xh100"))
    name = "full rank" if linear == "full" else "CR-Net"
    if (choice := chosen(space)) is None:
        least = closest(space)
        cells = [f"nothing fits: {least.layout.describe()}", "", f"{least.peak_bytes / GIB:.0f}"]
        return f"| {size} | {name} | {number} | {' | '.join(cells)} | | | | |"
    best, seconds = choice.best, choice.best.seconds
    layout = best.layout
    compiled = ", compiled" if layout.compiles else ""
    cells = [
        layout.describe(),
        f"{layout.micro_batch_size}, {layout.policy}{compiled}",
        f"{best.peak_bytes / GIB:.0f}",
        f"{seconds.overlapped:.2f}",
        f"{seconds.apart:.2f}",
        f"{choice.tokens_per_s(best) / 1e6:.2f}",
        f"{choice.peak_frac(best):.0%}",
    ]
    return f"| {size} | {name} | {number} | {' | '.join(cells)} |"


def paper_setting() -> list[str]:
    """Table 22's rows in table 21's setting: 16 sequences of 4,096 tokens, bf16, A100 80G, stages
    of one device; r = h/4; one micro-batch through all stages. Full rank runs blocks again, CR-Net
    replays."""
    lines, on = [], HARDWARE["a100-80g-pcie"]
    for (method, size), printed in PRINTED_22.items():
        linear, policy = ("full", "block") if method == "Full-rank" else ("crnet", "replay")
        processes = {"13B": 2, "70B": 8}[size]
        config = override(
            PRESETS[SIZES_ON_PAPER[size]][1],
            model={"linear": linear, "rank": "0.25h"},
            data={"sequence_length": 4096},
            train={"precision": "bf16", "recompute": policy, "device": "cuda"},
            parallel={"pipeline": processes},
        )
        batch = {"batch_size": 16 * processes, "micro_batch_size": 16}
        work = workload(override(config, train=batch))
        stages = cut(work.spec, processes, 4096)
        computed = stage_seconds(clock_of(work.micro_batch, on), work.plan, stages)
        seconds = sum(each.both_s for each in computed)
        flops = step_flops(work, work.plan)["total"] / processes
        crossing = 2 * sum(boundary_bytes(work.micro_batch, each.bottom) for each in stages[1:])
        fullest = max(sum(each.values()) for each in process_bytes(work, config.parallel))
        of_paper = printed.split()
        cells = [
            f"{of_paper[0]} / {flops / 1e15:.2f}",
            f"{of_paper[1]} / {flops / 312e12:.1f} / {seconds:.1f}",
            f"{of_paper[2]} / {crossing / GIB:.2f}",
            f"{of_paper[3]} / {crossing / 64e9:.3f}",
            f"{fullest / GIB:.0f}",
        ]
        lines.append(f"| {size} {method} | {' | '.join(cells)} |")
    return lines


def test_the_setting_of_the_paper() -> None:
    assert "\n".join(paper_setting()) in DOCUMENT.read_text(encoding="utf-8"), "\n".join(
        paper_setting()
    )


def test_on_paper_one_line() -> None:
    """All of them: below, slow."""
    assert on_paper("1B", "full", 8) in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(900)  # two and a half minutes of one core, where nothing else runs
def test_on_paper() -> None:
    every = itertools.product(SIZES_ON_PAPER, ("full", "crnet"), DEVICES)
    table = "\n".join(on_paper(*each) for each in every)
    assert table in DOCUMENT.read_text(encoding="utf-8"), table


LAYOUTS = {
    "alone": {},
    "data": {"data": 2},
    "shard": {"shard": 2},
    "data x shard": {"data": 2, "shard": 2},
    "pipeline": {"pipeline": 2},
    "data x pipeline": {"data": 2, "pipeline": 2},
    "shard x pipeline": {"shard": 2, "pipeline": 2},
    "tensor": {"tensor": 2},
    "data x tensor": {"data": 2, "tensor": 2},
    "shard x tensor": {"shard": 2, "tensor": 2},
}
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "every parameterization and stream": {
        f"{key} {name}": {"model": {key: name}}
        for key, seam in (("linear", linears), ("stream", streams))
        for name in seam.names()
    },
    "every optimizer": {name: {"optimizer": {"name": name}} for name in optimizers.names()},
    "recompute `block`, `replay`": {
        name: {"train": {"recompute": name}} for name in ("block", "replay")
    },
    "activations kept as nf4": {
        name: {"train": {"recompute": name, "keep_as": "nf4"}} for name in ("none", "replay")
    },
    "recompute `invert`": {"": {"train": {"recompute": "invert"}}},
    "bf16-mixed": {"": {"train": {"precision": "bf16-mixed"}}},
    "bf16": {"": {"train": {"precision": "bf16"}}},
    "`--train.compile`": {"": {"train": {"compile": True}}},
    "`--train.adapter`": {"": {"train": {"adapter": "lora", "init_from": Path("run")}}},
    "checkpoints in parts": {"": {"parallel": {"checkpoint": "parts"}}},
    "tied head": {"": {"model": {"tie_embeddings": True}}},
}


def is_taken(parallel: dict[str, int], sections: dict[str, dict[str, Any]]) -> bool:
    rows = {"batch_size": 16, "micro_batch_size": 2}
    config = override(RunConfig(), parallel=parallel, train=rows)
    try:
        check(override(config, **sections))
    except ConfigError:
        return False
    return True


def layouts_table() -> list[str]:
    """What is taken and what is refused, asked of ``config.check``."""
    lines = [f"| | {' | '.join(LAYOUTS)} |", f"|{'---|' * (len(LAYOUTS) + 1)}"]
    for row, variants in ROWS.items():
        cells = []
        for parallel in LAYOUTS.values():
            names = [name for name, each in variants.items() if is_taken(parallel, each)]
            some = ", ".join(names) if row == "every optimizer" else "some"
            cells.append("yes" if len(names) == len(variants) else some if names else "no")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def test_what_is_refused_is_what_the_page_says() -> None:
    assert "\n".join(layouts_table()) in DOCUMENT.read_text(encoding="utf-8"), "\n".join(
        layouts_table()
    )


def products(number: int) -> list[dict[str, int]]:
    return [dict.fromkeys(each, 2) for each in itertools.combinations(SIZES, number)]


def test_other_products_are_refused() -> None:
    """Of all pairs of sizes, those that the page does not name."""
    named = [each for each in LAYOUTS.values() if len(each) == 2]
    for pair in products(2):
        assert is_taken(pair, {}) == (pair in named), pair


def test_copies_of_what_is_split() -> None:
    """Of three sizes: data x shard where shard is taken, with what is taken there; no others."""
    for sizes in products(3):
        alone = {key: size for key, size in sizes.items() if key != "data"}
        is_named = len(alone) == 2 and "shard" in alone and is_taken(alone, {})
        assert is_taken(sizes, {}) == is_named, sizes
        for variants in ROWS.values() if is_named else ():
            for each in variants.values():
                assert is_taken(sizes, each) == is_taken(alone, each), (sizes, each)
    assert not is_taken(products(4)[0], {})
