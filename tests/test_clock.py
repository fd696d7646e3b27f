"""The cost model's clock: its counts against operations traced without memory, and its limits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from crnet import linears
from crnet.cli.app import main
from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig, RunConfig
from crnet.config.serialize import override
from crnet.cost.clock import clock_of
from crnet.cost.hardware import DEVICES, device
from crnet.cost.micro_batch import MicroBatch, Precision
from crnet.cost.plan_choice import usual_plan
from crnet.cost.stage_clock import num_kernels, step_seconds
from crnet.cost.traffic import head_products, micro_batch_passes
from crnet.cost.workload import Workload, workload
from crnet.linears.full import Full
from crnet.measure import memory
from crnet.measure.profile import Probe, precision_advice, product_seconds
from crnet.measure.traffic import traffic
from crnet.model.build import build
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Traffic, Work
from test_cost import PRECISIONS, random_case

MODEL = ModelConfig(
    hidden_size=256,
    intermediate_size=640,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=1000,
    rank="48",
)
MOST_OFF = 0.02
"""Of bytes and kernels: masks, counts and other numbers a row are not declared."""


def declared_products(micro_batch: MicroBatch) -> Traffic:
    e = micro_batch.compute_bytes
    found = Traffic()
    for block in micro_batch.blocks:
        for work in block.works.values():
            for product in (*work.products, *work.backward_products):
                found += Traffic(product.moved_bytes(e), 1)
    for product, count in head_products(micro_batch):
        found += Traffic(product.moved_bytes(e), 1) * count
    return found


def cases() -> list[tuple[str, Precision]]:
    """The three that comparisons are made of in every precision, the others in one by turns;
    SwitchLoRA, whose pools autocast passes over, in mixed precision too."""
    main_ones = ("full", "crnet", "lowrank")
    others = [name for name in linears.names() if name not in main_ones]
    found: list[tuple[str, Precision]] = [(n, p) for n in main_ones for p in PRECISIONS]
    found += [(name, PRECISIONS[idx % 3]) for idx, name in enumerate(others)]
    return [*dict.fromkeys((*found, ("switchlora", "bf16-mixed")))]


@pytest.mark.parametrize(("linear", "precision"), cases())
def test_the_eager_step_is_what_operations_move(linear: str, precision: Precision):
    """Every operation of a micro-batch, forward and backward, traced on tensors without memory:
    bytes and kernels within 2%, those of products exactly."""
    model = dataclasses.replace(MODEL, linear=linear)
    micro_batch = MicroBatch(model_spec(model), 4, 128, precision)
    passes, products = traffic(micro_batch)
    eager = micro_batch_passes(micro_batch).eager
    assert abs(eager.moved_bytes / passes.moved_bytes - 1) < MOST_OFF
    assert abs(eager.kernels / passes.kernels - 1) < MOST_OFF + 6 / passes.kernels
    found = declared_products(micro_batch)
    assert found.kernels == products.kernels
    assert found.moved_bytes == pytest.approx(products.moved_bytes, rel=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_normed_heads_are_counted(precision: Precision):
    """Norms of queries and keys: the same limits."""
    options = dataclasses.replace(MODEL.llama, qk_norm=True)  # type: ignore[attr-defined]
    model = dataclasses.replace(MODEL, linear="full", head_size=32, llama=options)
    micro_batch = MicroBatch(model_spec(model), 4, 128, precision)
    passes, _ = traffic(micro_batch)
    eager = micro_batch_passes(micro_batch).eager
    assert abs(eager.moved_bytes / passes.moved_bytes - 1) < MOST_OFF
    assert abs(eager.kernels / passes.kernels - 1) < MOST_OFF + 6 / passes.kernels


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "sizes", [{}, {"q_lora_rank": 64, "v_head_dim": 48}, {"qk_nope_head_dim": 32}]
)
def test_latents_are_counted(sizes: dict[str, int], precision: Precision):
    """Norms of latents, parts put side by side, values filled up or as wide as keys: the same."""
    model = dataclasses.replace(MODEL, linear="full", architecture="mla", num_kv_heads=None)
    options = dataclasses.replace(MODEL.mla, **sizes)  # type: ignore[attr-defined]
    micro_batch = MicroBatch(model_spec(dataclasses.replace(model, mla=options)), 4, 128, precision)
    passes, _ = traffic(micro_batch)
    eager = micro_batch_passes(micro_batch).eager
    assert abs(eager.moved_bytes / passes.moved_bytes - 1) < MOST_OFF
    assert abs(eager.kernels / passes.kernels - 1) < MOST_OFF + 6 / passes.kernels


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dealing_tokens_to_experts_is_counted(precision: Precision):
    """Bytes within 5%: the router's own numbers, some a token, are not declared."""
    model = dataclasses.replace(MODEL, linear="crnet", architecture="qwen3-moe")
    micro_batch = MicroBatch(model_spec(model), 4, 128, precision)
    passes, _ = traffic(micro_batch)
    eager = micro_batch_passes(micro_batch).eager
    assert abs(eager.moved_bytes / passes.moved_bytes - 1) < 0.05
    assert abs(eager.kernels / passes.kernels - 1) < MOST_OFF + 6 / passes.kernels


@pytest.mark.parametrize("linear", linears.names())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_have_the_declared_flops(linear: str, precision: Precision):
    for block in random_case(linear, precision).blocks:
        for work in block.works.values():
            assert sum(product.flops for product in work.products) == work.forward_flops
            assert sum(product.flops for product in work.backward_products) == work.backward_flops


def test_tracing_leaves_nothing_without_memory_behind():
    """Rotary tables are cached: those of a trace must not reach a model that computes."""
    micro_batch = MicroBatch(model_spec(dataclasses.replace(MODEL, num_layers=1)), 1, 16)
    model = build(micro_batch.spec, 0)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    before = model(tokens, tokens)[0]
    traffic(micro_batch)
    assert torch.equal(model(tokens, tokens)[0], before)


def test_a_wider_carry_is_counted():
    """Outputs that travel in fp32 between bf16 blocks: casts, and a sum beside the product."""
    options = dataclasses.replace(MODEL.crnet, carry_dtype="fp32")  # type: ignore[attr-defined]
    micro_batch = MicroBatch(model_spec(dataclasses.replace(MODEL, crnet=options)), 4, 128, "bf16")
    passes, _ = traffic(micro_batch)
    eager = micro_batch_passes(micro_batch).eager
    assert abs(eager.moved_bytes / passes.moved_bytes - 1) < 0.05


# --- seconds --------------------------------------------------------------------------------------


def published(size: str, sequences: int, **changes: Any) -> Workload:
    train = {"batch_size": sequences, "micro_batch_size": sequences, "precision": "bf16"}
    config = override(presets.get(f"llama-{size}"), train=train | {"recompute": "none"})
    return workload(override(config, **changes))


def seconds(work: Workload, on: str = "h100", plan: RecomputePlan | None = None) -> dict:
    return step_seconds(work, plan or work.plan, device(on))


def test_seconds_scale_with_the_device_and_add_up():
    work = workload(override(presets.get("llama-60m"), train={"batch_size": 4}))
    for policy in ("none", "block", "replay"):
        plan = usual_plan(work.micro_batch, policy)
        one, other = (seconds(work, on, plan) for on in ("1e12,100", "4e12,400"))
        for way in ("eager", "compiled", "fused"):
            if (way, policy) == ("compiled", "replay"):
                assert "compiled: total" not in one  # a compiled block does not come apart
                continue
            assert one[f"{way}: total"] == pytest.approx(4 * other[f"{way}: total"])
            terms = [value for term, value in one.items() if term.startswith(way)]
            assert sum(terms) == pytest.approx(2 * one[f"{way}: total"])


def test_a_product_waits_for_its_operands_where_the_rank_is_small():
    """At rank 16 memory decides, and half of the rank is not half of the time."""
    low, half = (published("350m", 64, model={"rank": rank}) for rank in ("16", "8"))
    wide, narrow = (published("350m", 64, model={"rank": rank}) for rank in ("1024", "512"))
    blocks = [seconds(work)["eager: products"] for work in (low, half, wide, narrow)]
    assert blocks[1] / blocks[0] > 0.85
    assert blocks[3] / blocks[2] < 0.65


def test_eager_is_slower_than_compiled_than_fused():
    for size, sequences in (("130m", 64), ("1b", 16)):
        for linear in ("full", "crnet"):
            found = seconds(published(size, sequences, model={"linear": linear}))
            assert found["eager: total"] > found["compiled: total"] > found["fused: total"]


def test_small_models_gain_no_time_from_fewer_flops_while_eager():
    """The blocks have 0.52 of full rank's FLOPs at 130M and 0.37 at 7B; the eager step takes more
    time at 130M and three quarters at 7B. Fused, both take less."""
    ratios = {}
    for size, sequences in (("130m", 256), ("350m", 128), ("1b", 64), ("7b", 16)):
        sides = [
            seconds(published(size, sequences, model={"linear": linear}))
            for linear in ("crnet", "full")
        ]
        for way in ("eager", "fused"):
            times = [side[f"{way}: total"] - side[f"{way}: optimizer"] for side in sides]
            ratios[size, way] = times[0] / times[1]
    assert ratios["130m", "eager"] > 1.05
    assert ratios["130m", "eager"] > ratios["350m", "eager"] > ratios["1b", "eager"]
    assert 0.65 < ratios["7b", "eager"] < 0.8
    assert all(ratio < 1 for (_, way), ratio in ratios.items() if way == "fused")


def test_the_host_is_the_limit_of_a_small_eager_step():
    work = published("350m", 1)
    kernels = num_kernels(clock_of(work.micro_batch, DEVICES["h100"]), work.plan)
    assert seconds(work)["eager: total"] == kernels * DEVICES["h100"].issue_s
    large = published("350m", 128)
    kernels = num_kernels(clock_of(large.micro_batch, DEVICES["h100"]), large.plan)
    assert seconds(large)["eager: total"] > kernels * DEVICES["h100"].issue_s


def test_recomputation_takes_time():
    work = published("350m", 64)
    times = [
        seconds(work, plan=usual_plan(work.micro_batch, policy))["eager: total"]
        for policy in ("none", "replay", "block")
    ]
    assert times == sorted(times)
    assert 1.1 < times[1] / times[0] < times[2] / times[0] < 1.4


def test_fp32_is_priced_at_the_rate_of_fp32():
    """Without tensor cores: 67 TFLOPS of an H100, not 989."""
    narrow, wide = (
        published("1b", 16, model={"linear": "full"}, train={"precision": precision})
        for precision in ("bf16", "fp32")
    )
    times = seconds(wide)["eager: products"] / seconds(narrow)["eager: products"]
    assert times == pytest.approx(989 / 67, rel=0.05)


class Undeclared(Full):
    """Full rank that names no products."""

    def work(self, slot: Any, options: Any, rows: int, item_bytes: int) -> Work:
        declared = super().work(slot, options, rows, item_bytes)
        return dataclasses.replace(declared, products=(), backward_products=())


def test_a_method_that_declares_no_products_is_priced_by_its_flops():
    work = published("350m", 64, model={"linear": "full"})
    declared = seconds(work, "1e12,1e9")["eager: products"]  # memory without limit
    spec = dataclasses.replace(work.spec, linear=Undeclared())
    micro_batch = dataclasses.replace(work.micro_batch, spec=spec)
    found = seconds(dataclasses.replace(work, spec=spec, micro_batch=micro_batch), "1e12,1e9")
    assert found["eager: products"] == pytest.approx(declared)


# --- the commands ---------------------------------------------------------------------------------


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_cost_shows_three_ways(capsys: pytest.CaptureFixture[str]):
    words = ("cost", "llama-130m", "--train.micro-batch-size", "8", "--device", "h100")
    words += ("--train.precision", "fp32")
    rows = json.loads(output(capsys, *words, "--json"))["rows"]
    found = {row["term"]: row["value"] for row in rows if row["section"] == "seconds"}
    terms = ("products", "attention", "passes", "head", "optimizer", "total")
    assert [*found] == [
        f"{way}: {term}" for way in ("eager", "compiled", "fused") for term in terms
    ]
    text = output(capsys, *words)
    head, *lines = text[text.index("seconds of a step") :].splitlines()
    assert "67 TFLOPS (494 in TF32)" in head
    assert "not here yet" in head
    assert lines[0].split() == ["eager", "compiled", "fused"]
    assert [line.split()[0] for line in lines[1:]] == [*terms]
    assert lines[-1].split()[1] == f"{found['eager: total']:,.4f}"


def test_profile_takes_a_device_and_advises_a_precision(capsys: pytest.CaptureFixture[str]):
    shape = ("--model.hidden-size", "32", "--model.intermediate-size", "48", "--model.rank", "4")
    small = ("--model.num-layers", "2", "--model.num-heads", "2", "--data.vocab-size", "300")
    words = ("profile", *shape, *small, "--data.sequence-length", "16", "--rounds", "1")
    found = json.loads(output(capsys, *words, "--device", "1e12,100", "--json"))
    assert {*found["product_s"]} == {"fp32", "bf16"}
    assert "in fp32" in found["advice"]
    text = output(capsys, *words, "--device", "1e12,100")
    assert "seconds of a step on 1e12,100" in text
    assert "measured, eager" in text


def test_advice_names_the_faster_precision():
    assert "--train.precision fp32 is" in precision_advice({"fp32": 1.0, "bf16": 81.5})
    assert "81.5 times" in precision_advice({"fp32": 1.0, "bf16": 81.5})
    assert "--train.precision bf16-mixed (or" in precision_advice({"fp32": 8.0, "bf16": 1.0})
    assert "as long" in precision_advice({"fp32": 1.0, "bf16": 1.02})
    found = product_seconds(workload(RunConfig()), torch.device("cpu"))
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "replay"])
def test_flops_are_counted_without_holding_every_pair_of_tokens(policy: str):
    """MATH attention at the whole micro-batch would hold 48 MiB of scores a map."""
    model = dataclasses.replace(MODEL, num_layers=2, hidden_size=32, intermediate_size=40, rank="4")
    config = override(
        RunConfig(model=dataclasses.replace(model, vocab_size=64)),
        data={"sequence_length": 512},
        train={"batch_size": 12, "recompute": policy},
    )
    work = workload(config)
    probe = Probe(work, torch.device("cpu"))
    scores = 12 * 4 * 512 * 512 * 4
    probe.flops()  # imports
    found: dict[str, int] = {}
    peak = memory.peak_bytes(lambda: found.update(probe.flops()))
    assert peak < (scores / 10 if policy == "none" else scores)
    assert found["total"] == sum(found.values()) - found["total"]
