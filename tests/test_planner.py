"""The planner: within the budget, and no block of what it finds can be raised."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import subprocess
import sys
from typing import Any

import pytest

from crnet.cli.app import app_for
from crnet.config import presets
from crnet.config.check import check
from crnet.config.model_spec import ModelSpec
from crnet.config.sections import ModelConfig, RunConfig
from crnet.config.serialize import command_line, override
from crnet.config.units import GIB
from crnet.cost.flops import block_flops
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.parameters import num_parameters
from crnet.cost.peak import peak_bytes
from crnet.cost.rank_search import PROFILES, Budget, Found, RankProfile, find, parse_profile
from crnet.cost.rank_search import schedule as shortest
from crnet.cost.step import step_memory
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.linears import parse_ranks
from crnet.linears.crnet import CRNetOptions
from crnet.recompute.plan import RecomputePlan

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")


def spec_of(config: RunConfig) -> ModelSpec:
    return workload(config).spec


def total(config: RunConfig) -> int:
    return workload(config).num_parameters()


def state(config: RunConfig) -> int:
    return sum(workload(config).state_bytes.values())


def memory(config: RunConfig) -> int:
    return step_memory(workload(config))


def flops_frac(config: RunConfig) -> float:
    ours, full = (
        block_flops(MicroBatch(spec_of(each), 1, config.data.sequence_length), RecomputePlan())
        for each in (config, full_rank(config))
    )
    return ours["forward"] / full["forward"]


def full_rank(config: RunConfig) -> RunConfig:
    return override(config, model={"linear": "full"})


def with_rank(config: RunConfig, rank: str) -> RunConfig:
    return override(config, model={"rank": rank})


def holds(config: RunConfig, budget: Budget) -> bool:
    """By the closed forms themselves; ``like`` is left to its own tests."""
    return (
        (budget.parameters is None or total(config) <= budget.parameters)
        and (budget.state_gib is None or state(config) <= budget.state_gib * GIB)
        and (budget.memory_gib is None or memory(config) <= budget.memory_gib * GIB)
        and (budget.flops_frac is None or flops_frac(config) <= budget.flops_frac)
    )


def ranks_of(config: RunConfig) -> list[list[int]]:
    """Of the blocks that the schedule speaks of, seven each."""
    spec = spec_of(config)
    return [
        [slot.rank for slot in block]
        for idx, block in enumerate(spec.slots)
        if spec.linear.fixed_rank(idx, spec.linear_options) is None
    ]


def written(blocks: list[list[int]]) -> str:
    """The longest way to say it: every position apart, every block by itself."""
    columns = [",".join(f"{rank}x1" for rank in column) for column in zip(*blocks, strict=True)]
    pairs = zip(POSITIONS, columns, strict=True)
    return columns[0] + "".join(f"/{position}={text}" for position, text in pairs)


def raisable(config: RunConfig, multiple: int) -> list[RunConfig]:
    """The configuration with one block raised by one multiple, for every block that can be."""
    blocks, positions = ranks_of(config), spec_of(config).positions
    caps = [min(each.in_size, each.out_size) // multiple * multiple for each in positions]
    found = []
    for idx, block in enumerate(blocks):
        more = [min(rank + multiple, cap) for rank, cap in zip(block, caps, strict=True)]
        if more != block:
            found.append(with_rank(config, written([*blocks[:idx], more, *blocks[idx + 1 :]])))
    return found


def check_found(found: Found, budget: Budget, multiple: int) -> None:
    """What ``find`` promises, whatever came in."""
    config = found.config
    check(config)
    assert holds(config, budget)
    assert found.rank == config.model.rank
    for block, widths in [(block, spec_of(config).positions) for block in ranks_of(config)]:
        for rank, position in zip(block, widths, strict=True):
            assert rank % multiple == 0
            assert multiple <= rank <= min(position.in_size, position.out_size)
    assert ranks_of(with_rank(config, written(ranks_of(config)))) == ranks_of(config)
    assert found.parameters == num_parameters(spec_of(config))
    assert found.state_bytes == workload(config).state_bytes
    assert found.peak_bytes == memory(config)
    assert found.flops_frac == flops_frac(config)
    assert all(limit.used <= limit.most for limit in found.limits)


# --- the promise ----------------------------------------------------------------------------------

BUDGETS: dict[str, Any] = {
    "parameters": lambda full: Budget(parameters=int(0.75 * total(full))),
    "state": lambda full: Budget(state_gib=0.6 * state(full) / GIB),
    "flops": lambda full: Budget(flops_frac=0.45),
    "memory": lambda full: Budget(memory_gib=0.9 * memory(full) / GIB),
    "all at once": lambda full: Budget(
        parameters=int(0.8 * total(full)),
        state_gib=0.75 * state(full) / GIB,
        memory_gib=0.95 * memory(full) / GIB,
        flops_frac=0.5,
    ),
}


@pytest.mark.parametrize(
    ("preset", "profile", "kind", "multiple"),
    [
        ("llama-60m", "flat", "parameters", 1),
        ("llama-60m", "flat", "all at once", 64),
        ("llama-60m", "middle-heavy", "memory", 16),
        ("llama-130m", "upper-heavy", "state", 64),
        ("llama-130m", "flat/q=0.3", "all at once", 1),
        pytest.param("llama-350m", "lower-heavy", "all at once", 16, marks=pytest.mark.slow),
        pytest.param("llama-1b", "flat", "memory", 1, marks=pytest.mark.slow),
        pytest.param("llama-7b", "middle-heavy/v=1.5/k=0.5", "flops", 16, marks=pytest.mark.slow),
        pytest.param("llama-7b", "flat", "parameters", 64, marks=pytest.mark.slow),
        pytest.param("llama3-1b", "flat/down=2", "all at once", 64, marks=pytest.mark.slow),
        ("llama3-1b", "middle-heavy", "parameters", 1),
        ("llama3-1b", "upper-heavy", "flops", 16),
    ],
)
def test_nothing_more_fits(preset: str, profile: str, kind: str, multiple: int):
    config = override(presets.get(preset), train={"micro_batch_size": 4, "precision": "bf16"})
    budget = BUDGETS[kind](full_rank(config))
    found = find(config, budget, parse_profile(profile), multiple)
    check_found(found, budget, multiple)
    more = raisable(found.config, multiple)
    assert more, "the budget is meant to bind"
    assert not any(holds(each, budget) for each in more)
    assert found.binding


@pytest.mark.parametrize(
    ("preset", "multiple"),
    [
        ("llama-60m", 1),
        ("llama-60m", 64),
        ("llama-130m", 16),
        ("llama-350m", 1),
        ("llama-1b", 64),
        ("llama-7b", 16),
    ],
)
def test_uniform_is_the_largest_one_rank(preset: str, multiple: int):
    config = presets.get(preset)
    budget = Budget(parameters=int(0.8 * total(full_rank(config))))
    found = find(config, budget, multiple=multiple)
    check_found(found, budget, multiple)
    assert not holds(with_rank(config, str(int(found.rank) + multiple)), budget)


@pytest.mark.parametrize(("multiple", "rank"), [(1, "555/k=512/v=512"), (64, "512")])
def test_uniform_stops_at_narrow_maps(multiple: int, rank: str):
    """Grouped-query attention: k and v are 512 wide, and stay there while the rest grows."""
    config = presets.get("llama3-1b")
    budget = Budget(parameters=total(with_rank(config, "555/k=512/v=512")))
    found = find(config, budget, multiple=multiple)
    check_found(found, budget, multiple)
    assert found.rank == rank


@pytest.mark.parametrize("seed", range(20))
def test_drawn_shapes_weights_and_budgets(seed: int):
    draw = random.Random(seed)
    linear = draw.choice(["crnet", "crnet", "lowrank", "resformer"])
    options = {}
    if linear == "crnet":
        options["crnet"] = CRNetOptions(first_rank=draw.choice([None, 3]))
    heads = draw.choice([2, 4, 6])
    model = ModelConfig(
        linear=linear,
        hidden_size=heads * draw.choice([16, 32]),
        intermediate_size=draw.choice([96, 200]),
        num_layers=draw.randint(2, 9),
        num_heads=heads,
        num_kv_heads=draw.choice([None, 1, 2]),
        vocab_size=draw.choice([300, 1000]),
        tie_embeddings=draw.random() < 0.3,
        **options,
    )
    train = {
        "precision": draw.choice(["fp32", "bf16-mixed", "bf16"]),
        "recompute": draw.choice(["none", "block", "replay", *["invert"] * (linear == "crnet")]),
        "micro_batch_size": 2,
    }
    config = override(RunConfig(model=model), train=train, data={"sequence_length": 32})
    multiple = draw.choice([1, 1, 2, 8])
    low, high = (with_rank(config, rank) for rank in (str(multiple), "16"))
    num_blocks = len(ranks_of(low))
    share = draw.random()

    def between(use: Any) -> float:
        return use(low) + share * abs(use(high) - use(low))

    limits = {
        "parameters": int(between(total)),
        "state_gib": between(state) / GIB,
        "memory_gib": between(memory) / GIB,
        "flops_frac": between(flops_frac),
    }
    names = draw.sample(sorted(limits), draw.randint(1, 4))
    budget = Budget(**{name: limits[name] for name in names})
    layers = tuple(draw.choice([0.5, 1, 1.3, 2]) for _ in range(num_blocks))
    positions = {position: draw.choice([0.4, 1, 3]) for position in draw.sample(POSITIONS, 3)}
    found = find(config, budget, RankProfile("flat", layers, positions), multiple)
    check_found(found, budget, multiple)
    assert not any(holds(each, budget) for each in raisable(found.config, multiple))


def test_with_plenty_every_rank_is_its_width():
    """Grouped-query attention: k and v are narrower than the rest."""
    config = presets.get("llama3-1b")
    for profile in (RankProfile(), RankProfile("flat"), RankProfile("lower-heavy", (), {"k": 0.5})):
        found = find(config, Budget(parameters=10**12), profile, 64)
        assert found.rank == "2048/k=512/v=512"
        assert found.binding == []
        assert "nothing, every rank has reached its width" in found.explain()
        assert "above full rank" in found.explain()


# --- profiles and schedules -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "rank"),
    [
        ("lower-heavy", "256x7,192x16"),  # S1
        ("middle-heavy", "192x8,256x7,192x8"),  # S2
        ("upper-heavy", "192x16,256x7"),  # S3
    ],
)
@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_profiles_are_those_of_the_ablation(profile: str, rank: str, multiple: int):
    """Appendix E.2.6: the three take the same parameters, and the planner finds each again."""
    config = presets.get("llama-350m")
    target = total(with_rank(config, rank))
    assert target == total(with_rank(config, "192x16,256x7"))
    found = find(config, Budget(parameters=target), RankProfile(profile), multiple)
    assert found.rank == rank
    assert found.parameters["total"] == target


def test_weights_of_layers_and_positions():
    config = presets.get("llama-60m")
    profile = RankProfile(layers=(1, 1, 1, 1, 2, 2, 2), positions={"k": 0.5, "down": 1.5})
    rank = "64x4,128x3/k=32x4,64x3/down=96x4,192x3"
    target = total(with_rank(config, rank))
    found = find(config, Budget(parameters=target), profile, 32)
    assert ranks_of(found.config) == ranks_of(with_rank(config, rank))
    assert parse_profile("1x4,2x3/k=0.5/down=1.5") == dataclasses.replace(profile, name="flat")


def test_what_is_left_goes_to_the_heaviest_blocks_the_topmost_first():
    config = presets.get("llama-60m")
    profile = RankProfile(layers=(1, 1, 1, 1, 2, 2, 2))
    target = total(with_rank(config, "64x4,128x3"))
    block = 32 * (11 * 512 + 3 * 1376)  # one block's price of 32 more
    found = find(config, Budget(parameters=target + 2 * block), profile, 32)
    assert found.rank == "64x4,128,160x2"
    found = find(config, Budget(parameters=target + 3 * block - 1), profile, 32)
    assert found.rank == "64x4,128,160x2"


def test_flat_spends_what_uniform_leaves():
    config, budget = presets.get("llama-60m"), Budget(parameters=43_122_225)
    assert find(config, budget, RankProfile(), 16).rank == "96"
    assert find(config, budget, RankProfile("flat"), 16).rank == "96x3,112x4"


def test_schedule_is_short_and_parses_back():
    for blocks, text in {
        ((96,) * 7,) * 3: "96",
        ((96,) * 7, (112,) * 7, (112,) * 7): "96,112x2",
        ((96, 48, 96, 96, 96, 96, 96),) * 2: "96/k=48",
        ((8, 4, 8, 8, 8, 8, 8), (9, 4, 9, 9, 9, 9, 8)): "8,9/k=4/down=8",
    }.items():
        assert shortest(blocks, POSITIONS) == text
        parsed = parse_ranks(
            text, num_blocks=len(blocks), hidden_size=64, published={}, positions=POSITIONS
        )
        assert [*zip(*(parsed[position] for position in POSITIONS), strict=True)] == [*blocks]


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("like", "linear", "rank"),
    [
        ("lowrank:aligned-parameters", "lowrank", "aligned-parameters"),
        ("lowrank:300", "lowrank", "300"),
        ("lowrank", "lowrank", "aligned-parameters"),
        ("full", "full", "1"),
    ],
)
def test_like_another_parameterization(like: str, linear: str, rank: str):
    config = presets.get("llama-130m")
    other = override(config, model={"linear": linear, "rank": rank})
    (limit,) = find(config, Budget(like=like), RankProfile("flat"), 16).limits
    assert (limit.most, limit.flag, limit.kind) == (total(other), f"--like {like}", "parameters")
    (limit,) = find(config, Budget(like=f"{like}@adamw"), RankProfile("flat"), 16).limits
    assert (limit.most, limit.kind) == (state(other), "state")


def test_the_binding_limit_is_named():
    config = override(presets.get("llama-130m"), train={"micro_batch_size": 8})
    loose = {"parameters": 10**9, "state_gib": 50.0, "memory_gib": 100.0, "flops_frac": 2.0}
    tight = {"parameters": 80_000_000, "state_gib": 1.2, "memory_gib": 3.9, "flops_frac": 0.4}
    for name, limit in tight.items():
        found = find(config, Budget(**loose | {name: limit}), RankProfile("flat"), 16)
        flag = f"--{name.replace('_', '-')}"
        assert found.binding == [flag]
        (only,) = (each for each in found.limits if each.flag == flag)
        assert 0.97 < only.used / only.most <= 1
        assert f"binds: {flag}\n" in found.explain()


def test_explain_shows_what_is_used_and_the_baselines():
    train = {"precision": "bf16", "bf16_update": "plain", "recompute": "invert"}
    config = override(presets.get("llama-1b"), train=train)
    found = find(config, Budget(parameters=582_441_057), RankProfile("flat"), 64)
    text = found.explain()
    assert "--parameters: 582.44M of 582.44M (100.0%)" in text
    ours, full, lowrank = text.splitlines()[-3:]
    assert re.match(r"crnet 448, recompute invert +582.44M +4.340 GiB", ours)
    assert re.match(r"full, recompute none +1,339.08M +9.977 GiB .* 1.0000 of full rank", full)
    assert re.match(r"lowrank 512, recompute none +609.31M +4.540 GiB", lowrank)


def test_an_activation_budget_is_a_limit():
    """auto: ranks stay where some policy fits; the peak is that of the policy chosen."""
    train = {"micro_batch_size": 16, "precision": "bf16", "recompute": "auto"}
    config = override(presets.get("llama-60m"), train=train | {"activation_budget_gib": 0.35})
    found = find(config, Budget(parameters=10**9), RankProfile("flat"), 64)
    assert found.binding == ["--train.activation-budget-gib"]
    work = workload(found.config)
    assert work.plan.policy != "none"
    assert peak_bytes(work.micro_batch, work.plan) <= 0.35 * GIB
    for each in raisable(found.config, 64):
        with pytest.raises(ConfigError, match="activation-budget-gib"):
            workload(each)
    small = override(config, train={"activation_budget_gib": 0.1})
    with pytest.raises(ConfigError, match=r"activation-budget-gib 0.1: .* needs 0\.\d+ at least"):
        find(small, Budget(parameters=10**9), RankProfile("flat"), 64)


# --- budgets that cannot be met -------------------------------------------------------------------


def problems(config: RunConfig, budget: Budget, *rest: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        find(config, budget, *rest)
    return error.value.problems


def up(number: float, decimals: int) -> str:
    return f"{math.ceil(number * 10**decimals) / 10**decimals:,.{decimals}f}"


def test_impossible_budgets_say_why_and_what_would_do():
    config = override(presets.get("llama-60m"), train={"micro_batch_size": 16})
    least = with_rank(config, "16")
    budget = Budget(30_000_000, 0.13, 1.0, 0.1, "lowrank:16")
    found = problems(config, budget, RankProfile("flat"), 16)
    tables = 2 * 32_000 * 512
    dense = 4 * 512 * 512 + 3 * 512 * 1376
    weights = workload(least).state_bytes["weights"] / GIB
    activations = peak_bytes(workload(least).micro_batch, RecomputePlan()) / GIB
    full_flops = 8 * (2 * 256 * dense + 4 * 256 * 256 * 512)
    target = total(override(config, model={"linear": "lowrank", "rank": "16"}))
    rest = total(least) - tables - dense
    end = "; the least, rank 16 everywhere, takes "
    assert found == [
        f"--parameters (30.00M): embedding and head alone take {tables / 1e6:.2f}M{end}"
        f"{up(total(least) / 1e6, 2)}M",
        f"--state-gib (0.130 GiB): weights alone take {weights:.3f} GiB{end}"
        f"{up(state(least) / GIB, 3)} GiB",
        f"--memory-gib (1.000 GiB): activations at micro-batch 16 x 256 alone take "
        f"{activations:.3f} GiB{end}{up(memory(least) / GIB, 3)} GiB",
        f"--flops-frac (0.1000 of full rank): full-rank maps alone take "
        f"{2 * 256 * dense / full_flops:.4f} of full rank{end}{up(flops_frac(least), 4)} "
        "of full rank",
        f"--like lowrank:16 ({target / 1e6:.2f}M): embedding and head {tables / 1e6:.2f}M + "
        f"full-rank maps {dense / 1e6:.2f}M + the rest {rest / 1e6:.2f}M{end}"
        f"{up(total(least) / 1e6, 2)}M",
    ]
    numbers = [re.findall(r"takes ([\d.,]+)", text)[0].replace(",", "") for text in found]
    enough = Budget(
        parameters=round(float(numbers[0]) * 1e6),
        state_gib=float(numbers[1]),
        memory_gib=float(numbers[2]),
        flops_frac=float(numbers[3]),
    )
    assert find(config, enough, RankProfile("flat"), 16).rank == "16"


@pytest.mark.parametrize(
    ("change", "budget", "rest", "words"),
    [
        ({}, Budget(), (), ["no budget", "--flops-frac"]),
        ({}, Budget(parameters=0), (), ["--parameters", "above zero"]),
        ({}, Budget(memory_gib=math.nan, state_gib=-1), (), ["--memory-gib", "--state-gib"]),
        ({}, Budget(like="fulll"), (), ["--like fulll", "lowrank"]),
        ({}, Budget(like="full@adamww"), (), ["--like full@adamww", "adamw"]),
        ({"rank": "9x7"}, Budget(like="lowrank"), (), ["7 ranks, but 8", "lowrank:0.25h"]),
        ({}, Budget(like="lowrank:513"), (), ["--like lowrank:513", "512"]),
        ({"linear": "full"}, Budget(10**9), (), ["--model.linear full", "no block"]),
        ({"num_layers": 1}, Budget(10**9), (), ["--model.linear crnet", "no block"]),
        ({"num_heads": 7}, Budget(10**9), (), ["--model.num-heads 7"]),
        ({}, Budget(10**9), (RankProfile(), 0), ["--multiple is 0", "1 to 512"]),
        ({"num_kv_heads": 1}, Budget(10**9), (RankProfile(), 65), ["--multiple is 65", "1 to 64"]),
        ({}, Budget(10**9), (RankProfile("middle"),), ["--profile middle", "middle-heavy"]),
        ({}, Budget(10**9), (RankProfile("flat", (1, 2)),), ["2 weights for 7"]),
        ({}, Budget(10**9), (RankProfile("flat", (), {"w": 1}),), ["positions are q, k"]),
        ({}, Budget(10**9), (RankProfile("flat", (), {"k": 0}),), ["weights must lie in"]),
        ({}, Budget(10**9), (RankProfile("flat", (math.nan,) * 7),), ["weights must lie in"]),
    ],
)
def test_bad_input(change: dict[str, Any], budget: Budget, rest: Any, words: list[str]):
    config = override(presets.get("llama-60m"), model=change)
    text = "\n".join(problems(config, budget, *rest))
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "text", ["1x", "x3", "1,,2", "flat/k", "flat/k=a", "1xa", "flat/k=1=2", ""]
)
def test_profiles_that_cannot_be_read(text: str):
    if text == "1x":  # a weight for one block
        assert parse_profile(text) == RankProfile("flat", (1.0,))
    elif text.startswith("x"):
        assert parse_profile(text).name not in PROFILES  # find says which are known
    else:
        with pytest.raises(ConfigError, match="--profile"):
            parse_profile(text)


# --- the command line that trains it --------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train": {"compile": True, "micro_batch_size": 64, "precision": "bf16"}},
        {"model": {"crnet": {"learnable_beta": False}}, "data": {"source": ("a", "b")}},
        {"model": {"linear": "lowrank", "lowrank": {"init": "spectral"}}, "optimizer": {"lr": 0.1}},
    ],
)
def test_words_lead_to_the_configuration(change: dict[str, Any]):
    config = override(presets.get("llama3-1b"), **change)
    found = find(config, Budget(like="full"), RankProfile("flat"), 64)
    words = command_line(found.config)
    assert words[:2] == ["train", "llama3-1b"]
    _, bound, _ = app_for(words).parse_args(words, exit_on_error=False)
    assert bound.arguments["settings"].of(bound.arguments["preset"]) == found.config


# --- speed ----------------------------------------------------------------------------------------

TIMED = """
import sys, time
from crnet.config import presets
from crnet.cost.rank_search import Budget, find, parse_profile
for preset, parameters in (("llama-7b", 3e9), ("llama-70b", 3e10)):
    start_s = time.process_time()
    budget = Budget(parameters=int(parameters), state_gib=parameters * 16.5 / 2**30, flops_frac=0.5)
    find(presets.get(preset), budget, parse_profile("middle-heavy/k=0.5"), 16)
    print(time.process_time() - start_s)
print("torch" in sys.modules)
"""


def test_fast_and_without_torch():
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
    small_s, large_s, torch = done.stdout.split()
    assert float(small_s) < 0.5
    assert float(large_s) < 2
    assert torch == "False"
