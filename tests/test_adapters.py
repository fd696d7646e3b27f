"""An adapter on given weights: what trains, what is written, what reads it, what is refused.

Equality is by bits unless a tolerance is named; each tolerance says what rounds differently.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crnet
from crnet.adapters import beside
from crnet.cli.app import main
from crnet.config.adapter import NAME
from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost import table
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.hub import export as exports
from crnet.inference.load import load_model
from crnet.model.language_model import LanguageModel
from crnet.storage import checkpoint
from crnet.storage.checkpoint import ADAPTER, Checkpoint
from crnet.train.run import Result, make_step
from crnet.train.step import Step
from shapes import random_tokens
from test_checkpoint import killed_and_resumed
from test_parallel import Run, launch
from test_train import losses_of, run, tiny, weights_of

ON = {"adapter": "lora", "adapter_rank": 4}
MODELS: dict[str, dict[str, Any]] = {
    "crnet": {"linear": "crnet"},
    "full": {"linear": "full"},
    "lowrank": {"linear": "lowrank"},
    "lax": {"linear": "lax"},
    "attnres": {"linear": "crnet", "stream": "attnres"},
    "gpt2": {"linear": "crnet", "architecture": "gpt2"},
    "mla": {"linear": "crnet", "architecture": "mla", "mla": {"q_lora_rank": 16}},
    "restarts": {"linear": "crnet", "crnet": {"restarts": "2", "carry_dtype": "fp32"}},
}
"""Maps with a matrix, with factors, with a carry and one at the bottleneck; biases, a tied head."""
MORE = {name: {"linear": name} for name in ("resformer", "cola", "sltrain")}
ignoring = pytest.mark.filterwarnings("ignore")  # of what PEFT imports
Begun = Callable[[str], Result]


@pytest.fixture(scope="module")
def begun(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """A model by name, trained for a few steps."""
    folder = tmp_path_factory.mktemp("begun")

    @functools.cache
    def of(name: str) -> Result:
        return run(tiny(corpus, model=(MODELS | MORE)[name], train={"steps": 4}), folder / name)

    return of


def tuned(begun: Result, corpus: Path, name: str, **train: Any) -> RunConfig:
    start = {"init_from": begun.checkpoint, "steps": 6, "save_every_steps": 2, **ON}
    rate = {"lr": 3e-2}
    return tiny(corpus, model=(MODELS | MORE)[name], train=start | train, optimizer=rate)


@pytest.fixture(scope="module")
def adapted(begun: Begun, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """The same with an adapter, six steps on."""
    folder = tmp_path_factory.mktemp("adapted")

    @functools.cache
    def of(name: str) -> Result:
        return run(tuned(begun(name), corpus, name), folder / name)

    return of


def saved_of(result: Result) -> Checkpoint:
    assert result.checkpoint is not None
    return checkpoint.load(result.checkpoint)


def adapter_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    saved = checkpoint.newest(folder)
    assert saved is not None
    return load_file(saved.folder / ADAPTER)


def same(one: Path, two: Path) -> bool:
    """Whether the adapters of two runs, and what they logged, are equal."""
    found, wanted = adapter_of(one), adapter_of(two)
    assert found.keys() == wanted.keys()
    return losses_of(one) == losses_of(two) and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )


# What trains


@pytest.mark.slow
@ignoring
@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_trains_and_nothing_else(name: str, begun: Begun, adapted: Begun) -> None:
    """Frozen weights keep their bits, the adapter's tensors move, and PEFT counts as many."""
    import peft

    before, result = begun(name), adapted(name)
    model = load_model(saved_of(result))
    frozen = weights_of(before.run_dir)
    seen = {each.replace(".base_layer", ""): it for each, it in model.named_parameters()}
    for each, weight in frozen.items():
        assert torch.equal(seen[each], weight), each
        assert not seen[each].requires_grad
    trained = {each: parameter for each, (_, parameter) in model.trained().items()}
    assert {*seen} == {*frozen, *trained}
    fresh = load_model(saved_of(before))
    beside.put_beside(fresh, model.spec.adapter, seed=0)  # type: ignore[arg-type]
    for each, (_, parameter) in fresh.trained().items():
        moved = parameter.ne(trained[each])
        assert float(moved.float().mean()) > 0.9, each  # Adam's steps reach every item
        assert bool(parameter.any()) == (".lora_A." in each)
    assert result.after is not None
    assert result.before == before.after
    assert result.after.loss < result.before.loss  # type: ignore[union-attr]

    hf = pytest.importorskip("crnet.hf")
    from transformers import AutoModelForCausalLM

    base = hf.adaptable(AutoModelForCausalLM.from_pretrained(before.checkpoint))
    assert result.checkpoint is not None
    options = peft.PeftConfig.from_pretrained(result.checkpoint)
    options.inference_mode = False
    counted, _ = peft.get_peft_model(base, options).get_nb_trainable_parameters()
    assert counted == sum(parameter.numel() for parameter in trained.values())
    state = saved_of(result).state()["optimizer"]
    assert len(state["state"]) == len(trained)


@pytest.mark.slow
@ignoring
@pytest.mark.parametrize("name", MODELS)
def test_peft_opens_what_was_trained(name: str, begun: Begun, adapted: Begun) -> None:
    """Logits of ``PeftModel.from_pretrained``, by bits, with attention of the same kind."""
    import peft

    hf = pytest.importorskip("crnet.hf")
    from transformers import AutoModelForCausalLM

    result, tokens = adapted(name), random_tokens(2, 9)
    base = AutoModelForCausalLM.from_pretrained(begun(name).checkpoint)
    before = base(tokens).logits
    assert result.checkpoint is not None
    found = peft.PeftModel.from_pretrained(hf.adaptable(base), result.checkpoint)(tokens).logits
    wanted = load_model(saved_of(result)).logits(tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((wanted - before).abs().max()) > 1e-2


@pytest.mark.slow
@ignoring
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["block", "replay"])
def test_recomputation_changes_no_bit(
    policy: str, name: str, begun: Begun, adapted: Begun, corpus: Path, tmp_path: Path
) -> None:
    config = tuned(begun(name), corpus, name, recompute=policy)
    if policy == "replay" and name in ("lax", "attnres"):
        with pytest.raises(ConfigError, match="recompute replay"):
            check(config)
        return
    run(config, tmp_path)
    assert same(tmp_path, adapted(name).run_dir)


def step_of(begun: Result, config: RunConfig) -> Step:
    """Model and optimizer of a run, before its first step."""
    assert begun.checkpoint is not None
    vocab_size = checkpoint.load(begun.checkpoint).config.model.vocab_size
    config = override(config, model={"vocab_size": vocab_size})
    return make_step(config, workload(config).spec, torch.device("cpu"), None)


@pytest.mark.slow
@ignoring
@pytest.mark.parametrize("policy", ["none", "block", "replay"])
def test_what_is_frozen_gets_no_gradient_and_no_state(
    policy: str, begun: Begun, corpus: Path
) -> None:
    """And the table of ``crnet cost`` counts the state that there is."""
    from crnet.storage.checkpoint import Progress

    config = tuned(begun("crnet"), corpus, "crnet", recompute=policy)
    step = step_of(begun("crnet"), config)
    step.model.recompute(workload(step.config).plan)
    tokens = random_tokens(8, 16)
    step([(tokens, tokens)], Progress(0, 0, 0), None)
    for name, parameter in step.model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    held = [each for state in step.optimizer.state.values() for each in state.values()]
    states = workload(step.config).state_bytes
    assert states["optimizer state"] == sum(each.numel() * each.element_size() for each in held)
    trained = [parameter for _, parameter in step.model.trained().values()]
    assert states["gradients"] == sum(4 * parameter.numel() for parameter in trained)
    rows, titles = table.table_of(step.config)
    counts = {row.term: row.value for row in rows if row.section == "parameters"}
    assert counts["adapter"] == sum(parameter.numel() for parameter in trained)
    assert counts["total"] == sum(each.numel() for each in step.model.parameters())
    assert "without the adapter" in titles["kept"]


@pytest.mark.slow
@ignoring
@pytest.mark.parametrize("train", [{"precision": "bf16"}, {"precision": "bf16-mixed"}], ids=str)
def test_precisions(train: dict[str, str], begun: Begun, corpus: Path, tmp_path: Path) -> None:
    """The adapter is fp32 in both; accumulation in either learns."""
    config = tuned(begun("crnet"), corpus, "crnet", micro_batch_size=2, **train)
    result = run(config, tmp_path)
    assert {tensor.dtype for tensor in adapter_of(tmp_path).values()} == {torch.float32}
    assert result.before is not None
    assert result.after is not None
    assert result.after.loss < result.before.loss
    assert crnet.evaluate(tmp_path) == result.after


# Going on


@pytest.mark.slow
@ignoring
def test_a_stopped_run_goes_on_to_the_same_bits(
    begun: Begun, adapted: Begun, corpus: Path, tmp_path: Path
) -> None:
    """Also where the checkpoint's folder moved its run, but not where the weights under it are gone
    or are others."""
    start = tmp_path / "start"
    assert begun("crnet").checkpoint is not None
    shutil.copytree(begun("crnet").checkpoint, start)  # type: ignore[arg-type]
    config = tuned(begun("crnet"), corpus, "crnet", init_from=start)
    run(override(config, train={"stop_after_steps": 3}), tmp_path / "run")
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    noted = checkpoint.newest(moved)
    assert noted is not None
    assert noted.extra["base"] == str(start)
    start.rename(tmp_path / "hidden")
    with pytest.raises(ConfigError, match=r"the weights under it are in .*start; bring"):
        run(config, moved, resume=True)
    shutil.copytree(saved_of(adapted("crnet")).folder.parent / "step_4", start)
    with pytest.raises(ConfigError, match="is not the checkpoint that it was trained on"):
        load_model(noted)
    shutil.rmtree(start)
    (tmp_path / "hidden").rename(start)
    run(config, moved, resume=True)
    assert same(moved, adapted("crnet").run_dir)
    with pytest.raises(ConfigError, match=r"--train\.adapter-rank was 4 and is now 5"):
        run(override(config, train={"adapter_rank": 5}), moved, resume=True)


@pytest.mark.slow
@ignoring
def test_a_killed_run_goes_on_to_the_same_bits(begun: Begun, corpus: Path, tmp_path: Path) -> None:
    """kill -9 of the real program, after so many rows and while a checkpoint is written."""
    config = tuned(begun("crnet"), corpus, "crnet", steps=40, save_every_steps=5)
    assert killed_and_resumed(config, tmp_path / "killed", kills=2, seed=0)
    run(config, tmp_path / "whole")
    assert same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@ignoring
def test_two_processes_are_one(begun: Begun, adapted: Begun, corpus: Path, tmp_path: Path) -> None:
    """Tolerance: gradients are added up in another order."""
    config = override(tuned(begun("crnet"), corpus, "crnet"), parallel={"data": 2})
    launch(2, tmp_path, [Run("two", config, "two")])
    found, wanted = losses_of(tmp_path / "two"), losses_of(adapted("crnet").run_dir)
    assert found == pytest.approx(wanted, rel=2e-5)
    for name, tensor in adapter_of(tmp_path / "two").items():
        torch.testing.assert_close(
            tensor, adapter_of(adapted("crnet").run_dir)[name], rtol=0, atol=2e-3
        )


# The commands


@pytest.mark.slow
@ignoring
def test_commands(
    begun: Begun, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``crnet finetune`` is the function; evaluate, generate and report read what was tuned."""
    start, keys = begun("crnet").run_dir, {"source": corpus, "documents": "paragraph"}
    more = {"adapter": "lora", "adapter_rank": 2, "adapter_alpha": 8.0, "lr": 1e-2}
    result = crnet.finetune(start, out=tmp_path / "one", progress=False, **keys, **more)

    def call(line: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(line.split())
        assert not end.value.code
        return capsys.readouterr().out

    two = tmp_path / "two"
    call(
        f"finetune {start} --data.source {corpus} --data.documents paragraph --optimizer.lr 1e-2 "
        f"--train.adapter lora --train.adapter-rank 2 --train.adapter-alpha 8 --out {two}"
    )
    assert same(tmp_path / "one", two)
    assert result.after is not None
    figures = json.loads(call(f"evaluate {two} --json"))
    assert figures["val_loss"] == result.after.loss
    text = call(f"generate {two} --max-tokens 5 --greedy")
    assert text.strip() == crnet.generate(tmp_path / "one", max_tokens=5, greedy=True).strip()
    call(f"report {two} --out {tmp_path / 'page.html'}")
    assert (tmp_path / "page.html").exists()
    manifest = json.loads((two / "run.json").read_text())
    saved = checkpoint.newest(two)
    assert saved is not None
    count = sum(tensor.numel() for tensor in adapter_of(two).values())
    assert f"of which {count:,} are trained" in (saved.folder / "README.md").read_text()
    assert manifest["init_from"]["checkpoint"] == saved.extra["base"]
    with pytest.raises(ConfigError, match="is an adapter, and a run begins with a whole model"):
        crnet.finetune(two, source=corpus)
    with pytest.raises(ConfigError, match="is an adapter, and a run begins with a whole model"):
        run(tiny(corpus, train={"init_from": two}), tmp_path / "three")


# What is refused


BAD: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "no weights": ({"train": {"init_from": None}}, "name them with --train.init-from"),
    "rank alone": (
        {"train": {"adapter": None, "init_from": None}},
        r"--train\.adapter-rank has no effect",
    ),
    "rank 0": ({"train": {"adapter_rank": 0}}, r"--train\.adapter-rank is 0; it must be above"),
    "alpha": ({"train": {"adapter_alpha": 0.0}}, r"--train\.adapter-alpha is 0\.0; it must be"),
    "invert": ({"train": {"recompute": "invert"}}, "take replay or block"),
    "auto": (
        {"train": {"recompute": "auto", "activation_budget_gib": 1.0}},
        "does not know what an adapter keeps",
    ),
    "compile": ({"train": {"compile": True}}, "leave one of them out"),
    "lax": (
        {"train": {"recompute": "replay"}, "model": {"linear": "lax"}},
        "hands on its bottleneck",
    ),
    "lora": ({"model": {"linear": "lora"}}, "have a matrix and more"),
    "values": ({"model": {"linear": "value-resformer"}}, "its maps v have a matrix and more"),
    "shard": ({"parallel": {"shard": 2}}, "say --parallel.data"),
    "pipeline": ({"parallel": {"pipeline": 2}}, "say --parallel.data"),
    "tensor": ({"parallel": {"tensor": 2}}, "say --parallel.data"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(what: str) -> None:
    changes, message = BAD[what]
    config = RunConfig(train=dataclasses.replace(RunConfig().train, init_from=Path("run"), **ON))
    check(config)
    with pytest.raises(ConfigError, match=message):
        check(override(config, **changes))


def test_the_rule_of_maps_is_that_of_adaptable() -> None:
    """What is refused by declarations is what PEFT would not be told of, method by method."""
    from crnet.adapters.maps import adaptable
    from crnet.config.check_adapter import adapter_problems
    from shapes import make, one_of_every_method

    for name, config in one_of_every_method().items():
        model: LanguageModel = adaptable(make(config))
        train = dataclasses.replace(RunConfig().train, init_from=Path("run"), **ON)
        refused = list(adapter_problems(model.spec, train, RunConfig().parallel))
        maps = [linear for block in model.model.blocks() for linear in block.maps.values()]
        assert bool(refused) == any(not isinstance(it, torch.nn.Linear) for it in maps), name


@pytest.mark.slow
@ignoring
def test_a_damaged_adapter_is_named(adapted: Begun, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved = saved_of(adapted("crnet"))
    copied = tmp_path / "copy"
    shutil.copytree(saved.folder, copied)
    tensors = load_file(copied / ADAPTER)
    first, second, *_ = tensors
    tensors[first] = tensors[first][:1].clone()
    tensors["stranger"] = tensors.pop(second)
    save_file(tensors, copied / ADAPTER)
    with pytest.raises(ConfigError, match=rf"{ADAPTER}: (truncated|altered)"):
        checkpoint.load(copied)
    with pytest.raises(ConfigError) as caught:
        load_model(dataclasses.replace(saved, folder=copied))
    said = "\n".join(caught.value.problems)
    assert "stranger is unknown" in said
    assert f"{second} is missing" in said
    assert re.search(rf"{re.escape(first)} is \(1, ", said)
    assert NAME not in said


def test_plan_has_nothing_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main("plan tiny --devices 8xh100 --train.adapter lora --train.init-from run".split())
    assert end.value.code == 2
    assert "an adapter's model is given; leave it out" in capsys.readouterr().err


def test_profile_has_no_prediction_to_measure() -> None:
    from crnet.measure.profile import measured

    train = dataclasses.replace(RunConfig().train, init_from=Path("run"), **ON)
    with pytest.raises(ConfigError, match="there is no prediction to measure"):
        measured(workload(RunConfig(train=train)), torch.device("cpu"))


# Handing on


@pytest.mark.slow
@ignoring
@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_merged_it_is_an_ordinary_model(name: str, adapted: Begun, tmp_path: Path) -> None:
    """Of the same kind, its rank larger by the adapter's. Tolerance: one sum a map is another."""
    hf = pytest.importorskip("crnet.hf")
    from transformers import AutoModelForCausalLM

    saved, tokens, out = saved_of(adapted(name)), random_tokens(2, 9), tmp_path / "out"
    if name in ("lax", "cola", "sltrain"):
        with pytest.raises(ConfigError, match=r"no map of its kind .* take --to peft"):
            exports.export(saved, out)
        return
    exports.export(saved, out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, hf.CRNetForCausalLM)
    wanted = load_model(saved)
    found = model(tokens).logits
    torch.testing.assert_close(found, wanted.logits(tokens), rtol=1e-4, atol=1e-4)
    ranks = {slot.rank for block in model.config.spec.slots for slot in block if slot.rank}
    assert ranks == (set() if name == "full" else {12})
    if name in ("full", "lowrank"):
        exports.export_plain(saved, tmp_path / "plain")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(plain(tokens).logits, found, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@ignoring
def test_ranks_that_no_map_can_have_are_refused(begun: Begun, corpus: Path, tmp_path: Path) -> None:
    config = tuned(begun("crnet"), corpus, "crnet", adapter_rank=25, steps=1)
    run(config, tmp_path / "run")
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    with pytest.raises(ConfigError, match=r"rank 33 to .* above the smaller width .* --to peft"):
        exports.export(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@ignoring
def test_kept_apart(begun: Begun, adapted: Begun, tmp_path: Path) -> None:
    """What PEFT reads, the tokenizer and the card, to the byte; of a whole model it is refused."""
    saved = saved_of(adapted("crnet"))
    exports.export_adapter(saved, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        ADAPTER, "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (saved.folder / ADAPTER).read_bytes()
    with pytest.raises(ConfigError, match="holds a whole model and no adapter; take --to hf"):
        exports.export_adapter(saved_of(begun("crnet")), tmp_path / "no")
