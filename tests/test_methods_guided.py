"""Self-guided training: the dense map at first, plain low rank at the end, and the way from one to
the other: what leaves the model and the optimizer, and that a run goes on from any step of it.

Equality is to the bit where no tolerance is named.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import test_linears_methods as methods
import test_parallel as parallel
import test_step as steps
from crnet import linears
from crnet.config.check import check
from crnet.config.model_spec import model_at, model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.convert import convert_linears
from crnet.cost.step import step_flops
from crnet.cost.table import cost_rows, render, titles
from crnet.cost.workload import workload
from crnet.errors import ConfigError, TrainingError
from crnet.hub import export
from crnet.inference.load import load_model
from crnet.linears._maps import LinearMap
from crnet.linears.lowrank import LowRankOptions
from crnet.linears.self_guided import SelfGuidedOptions
from crnet.measure import contract
from crnet.measure import examples as small
from crnet.model.build import build
from crnet.report.gather import gather
from crnet.storage import checkpoint
from crnet.train import run as train
from crnet.train.resume import snapshot
from shapes import tiny as small_model
from test_linears_methods import each_dtype
from test_optimizer_state import assert_same
from test_train import rows_of, run, tiny

METHOD = linears.get("self-guided")

# --- one map --------------------------------------------------------------------------------------


def guided_map(rho: float = 0.25) -> Any:
    """A map that has its guide, at a share of it that no step need have."""
    linear: Any = methods.make(methods.CASES["self-guided"], torch.float32)
    linear.matrix_share, linear.scale = rho, 1 - rho
    return linear


def computed(linear: LinearMap, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient, the products in that dtype."""
    linear.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 12, generator=generator).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output, _ = linear(x, None)
    output.backward(torch.randn(3, 5, 20, generator=generator).to(output.dtype))
    grads = {name: each.grad for name, each in linear.named_parameters()}
    assert x.grad is not None
    return {"y": output.detach(), "x": x.grad} | {k: v for k, v in grads.items() if v is not None}


def plain(name: str, guided: LinearMap) -> LinearMap:
    """The map of another method with the tensors of this one."""
    method = linears.get(name)
    slot = dataclasses.replace(methods.CASES["self-guided"].slot, rank=4 if method.has_ranks else 0)
    linear = method.make(slot, LowRankOptions())
    for own, parameter in linear.named_parameters():
        parameter.data.copy_(guided.get_parameter(own))
    return linear


@each_dtype
@pytest.mark.parametrize(("rho", "name"), [(1.0, "full"), (0.0, "lowrank")])
def test_both_ends_are_the_plain_maps(rho: float, name: str, dtype: torch.dtype):
    """Output and gradients of x and of what the plain map has; what it has not gets zeros."""
    guided = guided_map(rho)
    ours, theirs = computed(guided, dtype), computed(plain(name, guided), dtype)
    assert ours.keys() == {"y", "x", "weight", "A", "B"}
    for key, value in ours.items():
        if key in theirs:
            assert torch.equal(value, theirs[key]), key
        else:
            assert not value.any(), key
    assert theirs["y"].any()


@each_dtype
def test_without_its_guide_it_is_low_rank(dtype: torch.dtype):
    guided = guided_map()
    expected = computed(plain("lowrank", guided), dtype)
    guided.register_parameter("weight", None)
    guided.take(SelfGuidedOptions(guided_steps=0))
    ours = computed(guided, dtype)
    assert ours.keys() == expected.keys() == {"y", "x", "A", "B"}
    for key, value in ours.items():
        assert torch.equal(value, expected[key]), key


def test_rho_is_a_cosine():
    """1e-15 of the formula; 1 before the first step, 1/2 halfway, 0 once the guide is over."""
    assert SelfGuidedOptions().rho == 0.5  # outside of a run
    assert SelfGuidedOptions(guided_steps=0).rho == 0
    found = [SelfGuidedOptions(guided_steps=10, done_steps=done).rho for done in range(10)]
    assert found[0] == 1
    assert found[5] == pytest.approx(0.5, abs=1e-15)
    assert found == [pytest.approx(math.cos(math.pi * t / 20) ** 2, abs=1e-15) for t in range(10)]


def test_options_follow_from_the_step():
    """Half of the run where nothing is said; what a checkpoint says goes on from there."""
    begun = METHOD.options_at(0, 300, SelfGuidedOptions())
    assert (begun.guided_steps, begun.done_steps) == (150, 0)
    for given in (SelfGuidedOptions(), begun):
        later = METHOD.options_at(149, 300, given)
        assert (later.guided_steps, later.done_steps) == (150, 149)
        for step in (150, 151, 300):
            gone = METHOD.options_at(step, 300, given)
            assert (gone.guided_steps, gone.done_steps) == (150, 150)
            assert (gone.is_guided, gone.rho) == (False, 0)
    once_more = METHOD.options_at(20, 1000, dataclasses.replace(begun, done_steps=100))
    assert (once_more.guided_steps, once_more.done_steps) == (150, 120)
    assert METHOD.options_at(0, 1, SelfGuidedOptions()).guided_steps == 1
    config = small_model(linear="lowrank")
    assert model_at(config, 5, 10) is config


@pytest.mark.parametrize("init", ["balanced", "spectral"])
def test_the_guide_begins_as_the_product(init: Any):
    """Every map's; its items have the standard deviation of dense ones (balanced, 10%)."""
    spec = model_spec(small_model(linear="self-guided", self_guided=SelfGuidedOptions(init=init)))
    model = build(spec, 0)
    other = small_model(linear="lowrank", lowrank=LowRankOptions(init=init))
    plain_model = build(model_spec(other), 0)
    for block, others in zip(model.model.blocks(), plain_model.model.blocks(), strict=True):
        for name, linear in block.maps.items():
            a, b = linear.A.detach(), linear.B.detach()
            assert torch.equal(linear.weight, (a @ b).T), name
            if init == "spectral":
                assert torch.equal(a, others.maps[name].A)
    guides = [each.flatten() for name, each in model.named_parameters() if "proj.weight" in name]
    assert len(guides) == 21
    if init == "balanced":
        assert float(torch.cat(guides).detach().std()) == pytest.approx(0.02, rel=0.1)


# --- a run ----------------------------------------------------------------------------------------


def guided(corpus: Path, **sections: dict[str, Any]) -> RunConfig:
    """12 steps, of which 6 are guided: every second one is saved, and all of these are kept."""
    config = tiny(
        corpus,
        model={"linear": "self-guided"},
        train={"save_every_steps": 2, "keep_checkpoints": 0, "eval_every_steps": 3},
    )
    return override(config, **sections)


def saved(folder: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.folder_of(folder, step))


def assert_same_run(ours: Path, theirs: Path, step: int) -> None:
    """Weights, state and configuration of a checkpoint, and every figure up to it."""
    one, other = saved(ours, step), saved(theirs, step)
    assert_same(one.weights(), other.weights())
    assert_same(one.state(), other.state())
    assert one.config == other.config
    timed = ("tokens_per_s", "peak_bytes")
    left, right = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows_of(folder)]
        for folder in (ours, theirs)
    )
    assert left == right


@pytest.fixture(scope="module")
def whole_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 12 steps, never interrupted."""
    folder = tmp_path_factory.mktemp("guided") / "run"
    result = run(guided(corpus), folder)
    lowrank = workload(guided(corpus, model={"linear": "lowrank", "vocab_size": 300}))
    assert result.num_parameters == lowrank.num_parameters()
    return folder


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_run_goes_on_from_any_step(corpus: Path, tmp_path: Path, whole_run: Path, step: int):
    """In its guided half, so that the guide ends after the resume; exactly at the end; behind."""
    config = guided(corpus)
    run(override(config, train={"stop_after_steps": step}), tmp_path / "run")
    assert run(config, tmp_path / "run", resume=True).finished
    assert_same_run(tmp_path / "run", whole_run, 12)


def test_a_run_stopped_thrice(corpus: Path, tmp_path: Path, whole_run: Path):
    """Before, at and after the end, each in a process state of its own."""
    config = guided(corpus)
    for idx, step in enumerate((5, 6, 7)):
        train_of = {"stop_after_steps": step}
        run(override(config, train=train_of), tmp_path / "run", resume=idx > 0)
    run(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole_run, 12)


def test_the_guide_is_gone_from_a_checkpoint(corpus: Path, whole_run: Path):
    """Weights, state and size of lowrank's, from the step on at which it ends; all of it before."""
    names = model_spec(dataclasses.replace(saved(whole_run, 12).config.model, linear="lowrank"))
    for step in range(2, 13, 2):
        found = saved(whole_run, step)
        weights, state = found.weights(), found.state()["optimizer"]
        guides = {name for name in weights if name not in names.tensors}
        options = found.config.model.self_guided
        of_state = {name for group in state["param_groups"] for name in group["names"]}
        assert of_state == weights.keys()
        assert len(state["state"]) == len(weights)
        assert len(guides) == (21 if step < 6 else 0)
        assert (options.guided_steps, options.done_steps) == (6, min(step, 6))
    assert weights.keys() == names.tensors.keys()


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": {"name": "muon"}},
    "adam8bit": {"optimizer": {"name": "adam8bit"}},
    "apollo": {"optimizer": {"name": "apollo", "apollo": {"rank": 4}}},
    "masters": {"train": {"precision": "bf16", "bf16_update": "masters", "micro_batch_size": 4}},
    "stochastic": {"train": {"precision": "bf16"}},
    "bf16-mixed, replay": {"train": {"precision": "bf16-mixed", "recompute": "replay"}},
    "decay": {"optimizer": {"weight_decay": 0.1}, "train": {"recompute": "block"}},
}


@pytest.mark.parametrize("changes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_state_that_stays_is_kept(corpus: Path, tmp_path: Path, changes: dict[str, Any]):
    """Whatever the optimizer: across the end as a run that was resumed just there, whose optimizer
    was built without the guide, and from before it."""
    config = override(guided(corpus, train={"steps": 8}), **changes)
    run(config, tmp_path / "whole")
    for step in (3, 4):
        folder = tmp_path / str(step)
        run(override(config, train={"stop_after_steps": step}), folder)
        run(config, folder, resume=True)
        assert_same_run(folder, tmp_path / "whole", 8)


def test_after_the_guide_a_run_is_low_rank(corpus: Path, tmp_path: Path, whole_run: Path):
    """The run of plain low rank that goes on from the weights and the state of the last guided
    step: the same weights and figures."""
    config = guided(corpus)
    run(override(config, model={"linear": "lowrank"}), tmp_path / "run")
    begun, last = saved(tmp_path / "run", 6), saved(whole_run, 6)
    contents = checkpoint.Contents(
        last.weights(),
        last.state(),
        begun.config,
        last.progress,
        last.extra,
        {"tokenizer": lambda to: shutil.copy(last.folder / "tokenizer.json", to) and None},
    )
    for step in (8, 10, 12):
        shutil.rmtree(checkpoint.folder_of(tmp_path / "run", step))
    checkpoint.save(tmp_path / "run", contents, keep=0)
    run(override(config, model={"linear": "lowrank"}), tmp_path / "run", resume=True)
    ours, theirs = saved(tmp_path / "run", 12), saved(whole_run, 12)
    assert_same(ours.weights(), theirs.weights())
    assert_same(ours.state(), theirs.state())


def test_another_length_of_the_guide_is_refused(corpus: Path, tmp_path: Path):
    """A longer run has another half: it says the length that it began with."""
    config = guided(corpus, train={"stop_after_steps": 4})
    run(config, tmp_path / "run")
    longer = override(config, train={"steps": 20, "stop_after_steps": 8})
    with pytest.raises(ConfigError, match=r"self-guided\.guided-steps was 6 and is now 10; a re"):
        run(longer, tmp_path / "run", resume=True)
    said = override(longer, model={"self_guided": {"guided_steps": 6}})
    assert run(said, tmp_path / "run", resume=True).step == 8
    assert not saved(tmp_path / "run", 8).config.model.self_guided.is_guided


def test_a_guide_that_outlives_the_run(corpus: Path, tmp_path: Path):
    """It is in the last checkpoint, and a run that begins with that goes on with it."""
    config = guided(corpus, model={"self_guided": {"guided_steps": 5}}, train={"steps": 3})
    first = run(config, tmp_path / "run")
    found = saved(tmp_path / "run", 3).config.model
    assert found.self_guided == SelfGuidedOptions(guided_steps=5, done_steps=3)
    tuned = dataclasses.replace(config, model=found)
    tuned = override(tuned, train={"init_from": first.run_dir, "steps": 4})
    result = run(tuned, tmp_path / "tuned")
    assert result.before == first.after
    assert not saved(tmp_path / "tuned", 4).config.model.self_guided.is_guided
    assert result.num_parameters < first.num_parameters


@pytest.mark.parametrize("step", [4, 6, 12])
@torch.no_grad()
def test_a_checkpoint_is_read_without_its_step(whole_run: Path, step: int, tmp_path: Path):
    """The loss that the run saw, from the folder alone; as one matrix a map (1e-5 of logits), the
    guide's share in it; token by token (fp64, 1e-9)."""
    found = saved(whole_run, step)
    model = load_model(found)
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model.logits(tokens)
    export.export_plain(found, tmp_path / "plain")
    transformers = pytest.importorskip("transformers")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(dense).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(dense(tokens).logits, logits, rtol=0, atol=1e-5)
    wide = model.double()
    caches = wide.new_caches(9)
    parts = [wide.logits(tokens[:, [idx]], caches) for idx in range(9)]
    error = (torch.cat(parts, 1) - wide.logits(tokens)).abs().max()
    assert float(error) < 1e-9
    first: Any = wide.model.blocks()[0].maps["q"]
    if step < 6:
        share = SelfGuidedOptions(guided_steps=6, done_steps=step).rho
        whole = share * first.weight + (1 - share) * (first.A @ first.B).T
    else:
        assert first.weight is None
        whole = (first.A @ first.B).T
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(first(x, None)[0], x @ whole.T, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 12])
@torch.no_grad()
def test_transformers_reads_it(whole_run: Path, step: int, tmp_path: Path):
    """Guided and after: logits of the package, to the bit, also after a round trip."""
    pytest.importorskip("transformers")
    from crnet.hf import CRNetForCausalLM

    found = saved(whole_run, step)
    tokens = torch.arange(18).view(2, 9)
    expected = load_model(found).eval().logits(tokens)
    model = CRNetForCausalLM.from_pretrained(found.folder).eval()
    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path / "again")
    again = CRNetForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens).logits, expected)


def test_a_report_of_a_run(corpus: Path, tmp_path: Path, whole_run: Path):
    """Size, FLOPs spent so far, and the matrices of the newest checkpoint: of the model that it is
    by then. A card, which cannot know what earlier steps took, does not say it."""
    run(override(guided(corpus), train={"stop_after_steps": 4}), tmp_path / "run")
    work = workload(saved(whole_run, 2).config)
    end = work.at_end()
    assert end is not None
    before, after = (step_flops(each, each.plan)["total"] for each in (work, end))
    for folder, num_parameters, flops in (
        (tmp_path / "run", work.num_parameters(), 4 * before),
        (whole_run, end.num_parameters(), 6 * before + 6 * after),
    ):
        (found,) = gather([folder], samples=False)["runs"]
        assert found["problems"] == []
        assert found["summary"]["parameters"] == num_parameters
        assert found["summary"]["flops"] == flops
        assert found["training"]["flops"][0] == before
        assert found["training"]["flops"][-1] == flops
        assert found["spectra"]
    card = (saved(whole_run, 12).folder / "README.md").read_text()
    assert "FLOPs a token" in card
    assert "in all" not in card


def test_the_export_is_that_of_low_rank(whole_run: Path, tmp_path: Path):
    """Files of the same weights under the one name and the other."""
    found = saved(whole_run, 12)
    model = dataclasses.replace(found.config.model, linear="lowrank")
    contents = checkpoint.Contents(
        found.weights(),
        {"optimizer": {}},
        dataclasses.replace(found.config, model=model),
        found.progress,
        found.extra,
        {"tokenizer": lambda to: shutil.copy(found.folder / "tokenizer.json", to) and None},
    )
    other = checkpoint.load(checkpoint.save(tmp_path / "other", contents, keep=0))
    for each, name in ((found, "ours"), (other, "theirs")):
        export.export_plain(each, tmp_path / name)
    for path in (tmp_path / "theirs").iterdir():
        if path.name != "README.md":  # which names the method
            assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes")
def test_copies_go_on_across_the_end(corpus: Path, tmp_path: Path):
    """Two processes: stopped before the guide ends and at its end, as never stopped; then one goes
    on with what two began (another order of sums: 1e-3, as ``test_parallel`` has it)."""
    config = override(parallel.configured(corpus, "guided", data=2), train={"save_every_steps": 1})
    runs = [parallel.Run("whole", config, "whole")]
    for step in (2, 3):
        stopped = override(config, train={"stop_after_steps": step})
        runs.append(parallel.Run(f"to {step}", stopped, f"stopped {step}"))
        runs.append(parallel.Run(f"from {step}", config, f"stopped {step}", resume=True))
    runs.append(parallel.Run("two", override(config, train={"stop_after_steps": 2}), "then alone"))
    parallel.launch(2, tmp_path, runs)
    for step in (2, 3):
        assert_same_run(tmp_path / f"stopped {step}", tmp_path / "whole", parallel.STEPS)
    assert not any(
        "weight" in name and "proj" in name for name in saved(tmp_path / "whole", 3).weights()
    )
    run(parallel.configured(corpus, "guided"), tmp_path / "then alone", resume=True)
    ours = saved(tmp_path / "then alone", parallel.STEPS).weights()
    theirs = saved(tmp_path / "whole", parallel.STEPS).weights()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-3, msg=name)


# --- steps from near ------------------------------------------------------------------------------


def test_a_late_step_that_is_not_finite_drops_nothing():
    """The error of the last guided step comes before the guide leaves."""
    config = override(
        steps.TINY, model={"linear": "self-guided", "self_guided": {"guided_steps": 2}}
    )
    step = steps.make_step(config, late=True)
    assert step.late
    step(steps.batch(0), steps.at(0), None)
    before = steps.everything(step)
    steps.spoil(step, "gradient")
    with pytest.raises(TrainingError, match="step 2: "):
        step(steps.batch(1), steps.at(1), None)
    assert steps.same(steps.everything(step), before)
    assert "weight" in dict(step.model.model.blocks()[0].maps["q"].named_parameters())


def test_an_optimizer_takes_over_what_it_is_like_to_be_built_anew():
    """Groups in the order of one that never had the guide, which is how a state is loaded."""
    config = override(
        steps.TINY, model={"linear": "self-guided", "self_guided": {"guided_steps": 2}}
    )
    step = steps.make_step(config, late=False)
    for number in range(3):
        step(steps.batch(number), steps.at(number), None)
    fresh = train.make_optimizer(config, step.model)
    ours = snapshot(step.optimizer, step.model.spec)["optimizer"]
    theirs = fresh.state_dict()
    assert [g["names"] for g in ours["param_groups"]] == [
        g["names"] for g in theirs["param_groups"]
    ]
    assert {float(state["step"]) for state in ours["state"].values()} == {3.0}
    assert step.optimizer.state.keys() == set(step.model.parameters())


def test_random_bits_go_on_from_where_they_were():
    """The number of updates, which seeds the rounding of bf16 weights, does not begin anew."""
    options = {"linear": "self-guided", "self_guided": {"guided_steps": 2}}
    config = override(steps.TINY, model=options, train={"precision": "bf16"})
    step = steps.make_step(config, late=False)
    for number in range(3):
        step(steps.batch(number), steps.at(number), None)
    assert [group["num_updates"] for group in step.optimizer.param_groups] == [3, 3, 3]


def test_decoding_beside_a_guide():
    """With a cache, in the middle of the guide (``contract.check_decoding``)."""
    options = SelfGuidedOptions(guided_steps=8, done_steps=3)
    example = small.examples(METHOD)[0]
    model = dataclasses.replace(example.model, self_guided=options)
    assert list(contract.check_decoding(dataclasses.replace(example, model=model))) == []


# --- what it costs, what is refused ---------------------------------------------------------------


def test_the_cost_is_said_of_both_halves():
    """Guided: low rank and full rank together, and the peak is that. After: low rank's, exactly."""
    config = override(RunConfig(), model={"linear": "self-guided", "rank": "16"})
    work = workload(config)
    low, full = (workload(override(config, model={"linear": name})) for name in ("lowrank", "full"))
    rows = {(row.section, row.term): row.value for row in cost_rows(work)}
    end = {term: value for (section, term), value in rows.items() if section == "at the end"}
    of_low = {(row.section, row.term): row.value for row in cost_rows(low)}
    assert end == {
        "parameters": of_low["parameters", "total"],
        **{term: of_low["state", term] for term in ("weights", "gradients", "optimizer state")},
        "memory at the peak": of_low["memory", "none"],
        "FLOPs of a step": of_low["flops", "total"],
    }
    assert not any(section == "at the end" for section, _ in of_low)
    outside = sum(
        spec.num_items for name, spec in low.spec.tensors.items() if name in full.spec.tensors
    )
    both = low.num_parameters() + full.num_parameters() - outside
    assert rows["parameters", "total"] == work.num_parameters() == both
    assert rows["memory", "none"] > end["memory at the peak"]
    assert work.num_steps_whole() == config.train.steps // 2
    assert low.num_steps_whole() == config.train.steps
    assert "after step 150, once tensors of self-guided have left the model" in render(
        cost_rows(work), titles(work)
    )
    stays = override(config, model={"self_guided": {"guided_steps": config.train.steps + 1}})
    assert workload(stays).at_end() is None
    assert workload(stays).num_steps_whole() == config.train.steps
    last = override(config, model={"self_guided": {"guided_steps": config.train.steps}})
    assert workload(last).num_steps_whole() == config.train.steps
    assert workload(last).at_end() is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"shard": 2}}, "--parallel.shard with --model.linear self-guided: tensors"),
        ({"parallel": {"pipeline": 2}}, "--parallel.pipeline with --model.linear self-guided: t"),
        ({"parallel": {"tensor": 2}}, "--parallel.tensor with self-guided: its guide leaves in"),
        ({"train": {"compile": True}}, "--train.compile with --model.linear self-guided: its"),
    ],
)
def test_layouts_that_hold_on_to_tensors_are_refused(changes: dict[str, Any], message: str):
    """With a guide; without one they are low rank's."""
    model = {"linear": "self-guided", "rank": "8"}
    config = override(RunConfig(), model=model, train={"batch_size": 8, "micro_batch_size": 2})
    config = override(config, **changes)
    with pytest.raises(ConfigError) as caught:
        check(config)
    (problem,) = caught.value.problems
    assert message in problem
    check(override(config, model={"self_guided": {"guided_steps": 0}}))
    check(override(config, model={"linear": "lowrank"}))


def test_copies_are_not_refused():
    model = {"linear": "self-guided", "rank": "8"}
    check(override(RunConfig(), model=model, parallel={"data": 2}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SelfGuidedOptions(guided_steps=-1), "guided-steps is -1; take 1 or more, 0 for no guide"),
        (SelfGuidedOptions(guided_steps=5, done_steps=6), "done-steps is 6 of guided-steps 5; it"),
        (SelfGuidedOptions(guided_steps=0, done_steps=1), "done-steps is 1 of guided-steps 0; it"),
        (SelfGuidedOptions(done_steps=1), "done-steps is 1 of guided-steps None; it is"),
        (SelfGuidedOptions(guided_steps=5, done_steps=-1), "done-steps is -1 of guided-steps 5"),
        (SelfGuidedOptions(lr_factor=0.0), "--model.self-guided.lr-factor is 0.0; it must be"),
    ],
)
def test_problems(options: SelfGuidedOptions, message: str):
    (problem,) = METHOD.problems(options, [])
    assert message in problem


def test_a_converted_model_has_no_loop_that_fades():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=31, **sizes)
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ConfigError, match="self-guided changes its weights"):
        convert_linears(model, linear="self-guided", rank=4)
    convert_linears(model, linear="self-guided", rank=4, guided_steps=0)
