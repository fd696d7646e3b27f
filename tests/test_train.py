"""The loop: its schedule, accumulation, evaluation, precision, and when it refuses to go on.

Equality is by bits unless a tolerance is named; each tolerance says what rounds differently.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from crnet.config.serialize import override
from crnet.data.prepare import prepare
from crnet.data.rows import IGNORED, Batches, Rows, validation_batches
from crnet.errors import ConfigError, TrainingError
from crnet.inference.evaluate import evaluate
from crnet.inference.load import load_model
from crnet.model.build import build, set_dtype
from crnet.storage import checkpoint, metrics
from crnet.storage.checkpoint import Progress
from crnet.train import run as train
from crnet.train import start
from crnet.train.step import learning_rate

LINEARS = ("crnet", "full", "lowrank")
TINY = RunConfig(
    model=ModelConfig(hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2, rank="8"),
    data=DataConfig(
        documents="paragraph", vocab_size=300, sequence_length=16, validation_tokens=600
    ),
    train=TrainConfig(
        steps=12,
        batch_size=8,
        threads=1,
        device="cpu",
        log_every_steps=1,
        eval_every_steps=5,
        save_every_steps=4,
    ),
)


def tiny(corpus: Path, **sections: dict[str, Any]) -> RunConfig:
    return override(override(TINY, data={"source": (str(corpus),)}), **sections)


def run(config: RunConfig, folder: Path, **options: Any) -> train.Result:
    return train.run(config, folder, progress=False, **options)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return metrics.read(folder / "metrics.jsonl")


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


def weights_of(folder: Path) -> dict[str, Tensor]:
    saved = checkpoint.newest(folder)
    assert saved is not None
    return saved.weights()


# The schedule


PUBLISHED = RunConfig(
    optimizer=OptimizerConfig(lr=1.0, warmup_frac=0.1, min_lr_frac=0.1),
    train=TrainConfig(steps=10_000),
)


@pytest.mark.parametrize(("step", "rate"), [(1, 0.001), (500, 0.5), (1000, 1.0), (10_000, 0.1)])
def test_schedule_at_its_corners(step: int, rate: float) -> None:
    assert learning_rate(step, PUBLISHED) == rate


@pytest.mark.parametrize(("step", "rate"), [(3250, 0.868198), (5500, 0.55), (7750, 0.231802)])
def test_schedule_along_the_cosine(step: int, rate: float) -> None:
    # The figures are given to six decimals.
    assert learning_rate(step, PUBLISHED) == pytest.approx(rate, abs=5e-7, rel=0)


def test_schedule_is_the_closed_form_scaled_by_the_peak() -> None:
    config = override(PUBLISHED, optimizer={"lr": 3e-3}, train={"steps": 70})
    for step in range(1, 71):
        warmup = 7
        if step < warmup:
            wanted = 3e-3 * step / warmup
        else:
            angle = math.pi * (step - warmup) / (70 - warmup)
            wanted = 3e-4 + 0.5 * (3e-3 - 3e-4) * (1 + math.cos(angle))
        # The two expressions round in another order: some units in the last place.
        assert learning_rate(step, config) == pytest.approx(wanted, rel=1e-14, abs=0)


@pytest.mark.parametrize(("warmup", "first", "last"), [(0.0, None, 0.1), (1.0, 0.1, 1.0)])
def test_schedule_without_warmup_and_with_nothing_else(
    warmup: float, first: float | None, last: float
) -> None:
    config = override(PUBLISHED, optimizer={"warmup_frac": warmup}, train={"steps": 10})
    rates = [learning_rate(step, config) for step in range(1, 11)]
    assert rates[-1] == last
    assert first is None or rates[0] == first
    assert rates == sorted(rates, reverse=warmup == 0)
    assert all(0.1 <= rate <= 1 for rate in rates)


def test_factors_take_their_share_of_the_rate(corpus: Path, tmp_path: Path) -> None:
    config = tiny(corpus, train={"steps": 3}, model={"linear": "crnet"})
    result = run(config, tmp_path / "run")
    assert result.checkpoint is not None
    groups = checkpoint.load(result.checkpoint).state()["optimizer"]["param_groups"]
    base = learning_rate(3, config)
    assert {(group["lr_factor"], group["lr"]) for group in groups} == {
        (1.0, base),
        (0.25, base * 0.25),
    }
    assert [row["lr"] for row in rows_of(tmp_path / "run") if "lr" in row] == [
        learning_rate(step, config) for step in (1, 2, 3)
    ]


# Accumulation


@pytest.fixture(scope="module")
def whole_batches(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[int, Path]]:
    """Three fp64 steps of the same batches of 8 rows with padding, by micro-batch size."""
    config = tiny(
        corpus,
        data={"rows": "document", "documents": "line"},
        train={"steps": 3, "eval_every_steps": 1, "save_every_steps": 0},
    )
    folders = {}
    torch.set_default_dtype(torch.float64)
    for size in (8, 4, 2, 1):
        folders[size] = tmp_path_factory.mktemp("accumulation") / str(size)
        run(override(config, train={"micro_batch_size": size}), folders[size])
    torch.set_default_dtype(torch.float32)
    return config, folders


@pytest.mark.parametrize("size", [4, 2, 1])
def test_micro_batches_add_up_to_the_batch(
    whole_batches: tuple[RunConfig, dict[int, Path]], size: int
) -> None:
    _, folders = whole_batches
    whole, parts = weights_of(folders[8]), weights_of(folders[size])
    assert whole.keys() == parts.keys()
    for name in whole:
        assert whole[name].dtype == torch.float64
        # fp64 sums in another order: 1e-17 in a gradient, over Adam's eps (1e-8), times the rate.
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-9)
    for ours, wanted in zip(rows_of(folders[size]), rows_of(folders[8]), strict=True):
        for key in wanted.keys() - {"tokens_per_s", "peak_bytes", "val_precision"}:
            assert ours[key] == pytest.approx(wanted[key], rel=1e-10)
        assert ours["step"] == wanted["step"]
        assert ours.get("tokens") == wanted.get("tokens")


def test_the_rows_of_that_test_are_ragged(
    whole_batches: tuple[RunConfig, dict[int, Path]],
) -> None:
    """Without padding a mean of means would pass too; here it is off by far more than 1e-9."""
    config, folders = whole_batches
    prepared = prepare(config.data, progress=False)
    rows = Rows(prepared, "train", config.data.sequence_length, "document")
    (batch,) = Batches(rows, config.train.seed, 8).next()
    counts = (batch[1] != IGNORED).sum(1)
    first = next(row for row in rows_of(folders[1]) if "tokens" in row)
    assert first["tokens"] == counts.sum()
    spec = model_spec(override(config, model={"vocab_size": 300}).model)
    model = build(spec, config.train.seed)
    with torch.no_grad():
        sums = [model(t, y)[0] for t, y in zip(*(part.split(1) for part in batch), strict=True)]
    means = torch.stack([one / count for one, count in zip(sums, counts, strict=True)])
    assert abs(means.mean().item() - first["loss"]) > 1e-5


@pytest.mark.parametrize("size", [4, 2, 1])
def test_first_step_in_fp32_has_the_same_loss_and_norm(
    corpus: Path, tmp_path: Path, size: int
) -> None:
    found = {}
    for micro in (8, size):
        config = tiny(corpus, data={"rows": "document", "documents": "line"}, train={"steps": 1})
        run(override(config, train={"micro_batch_size": micro}), tmp_path / str(micro))
        (found[micro],) = (row for row in rows_of(tmp_path / str(micro)) if "loss" in row)
    # fp32 sums of about a hundred terms in another order.
    assert found[size]["loss"] == pytest.approx(found[8]["loss"], rel=2e-6)
    assert found[size]["grad_norm"] == pytest.approx(found[8]["grad_norm"], rel=2e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3, 1e3])
def test_gradients_are_clipped(corpus: Path, clip_norm: float) -> None:
    """The norm that is logged is the one before; fp32, hence 1e-4."""
    config = tiny(corpus, model={"vocab_size": 300}, optimizer={"clip_norm": clip_norm})
    step = train.make_step(config, model_spec(config.model), torch.device("cpu"), None)
    rows = torch.arange(16).view(2, 8)
    done = step([(rows, rows + 1)], Progress(step=0, position=0, tokens=0), None)
    grads = [each.grad for _, each in step.model.trained().values() if each.grad is not None]
    found = torch.nn.utils.get_total_norm(grads).item()
    wanted = min(done.grad_norm, clip_norm) if clip_norm else done.grad_norm
    assert done.grad_norm > 1e-2
    assert found == pytest.approx(wanted, rel=1e-4)


# Evaluation


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_evaluation_is_the_same_for_any_micro_batch(
    corpus: Path, tmp_path: Path, mode: str
) -> None:
    found = set()
    for micro in (None, 1, 4):
        folder = tmp_path / str(micro)
        steps = {"steps": 1, "micro_batch_size": micro}
        run(tiny(corpus, data={"rows": mode}, train=steps), folder)
        manifest = json.loads((folder / "run.json").read_text())
        before = rows_of(folder)[0]
        hashed = manifest["data"]["hashes"]["validation"]
        found.add((before["val_loss"], before["val_tokens"], hashed))
    assert len(found) == 1


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_evaluation_is_the_mean_over_tokens(corpus: Path, tmp_path: Path, mode: str) -> None:
    config = tiny(corpus, data={"rows": mode}, train={"steps": 2})
    result = run(config, tmp_path / "run")
    assert result.after is not None
    assert result.checkpoint is not None
    saved = checkpoint.load(result.checkpoint)
    model = load_model(saved).double()
    prepared = prepare(config.data, progress=False)
    rows = Rows(prepared, "validation", config.data.sequence_length, config.data.rows)
    loss_sum, count = 0.0, 0
    for tokens, targets in validation_batches(rows, 1, config.data.validation_tokens):
        with torch.no_grad():
            logits = model.logits(tokens)[0]
        loss_sum += functional.cross_entropy(logits, targets[0], reduction="sum").item()
        count += int((targets != IGNORED).sum())
    assert result.after.tokens == count
    # fp32 logits against fp64 ones.
    assert result.after.loss == pytest.approx(loss_sum / count, rel=1e-6)
    assert result.after.perplexity == math.exp(result.after.loss)
    last = rows_of(tmp_path / "run")[-1]
    assert last == {
        "step": 2,
        **result.after.figures(),
        "val_precision": "fp32",
    }


def test_evaluations_come_when_they_are_due(corpus: Path, tmp_path: Path) -> None:
    def steps(**changes: int) -> list[int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run(tiny(corpus, train={"steps": 7, "save_every_steps": 0, **changes}), folder)
        return [row["step"] for row in rows_of(folder) if "val_loss" in row]

    assert steps(eval_every_steps=3) == [0, 3, 6, 7]
    assert steps(eval_every_steps=7) == [0, 7]
    assert steps(eval_every_steps=0) == [0, 7]


def test_evaluation_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    often, never = tmp_path / "often", tmp_path / "never"
    run(tiny(corpus, train={"eval_every_steps": 1}), often)
    run(tiny(corpus, train={"eval_every_steps": 0}), never)
    assert losses_of(often) == losses_of(never)
    theirs = weights_of(never)
    for name, weight in weights_of(often).items():
        assert torch.equal(weight, theirs[name])


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("linear", LINEARS)
def test_overfits_one_batch(tmp_path: Path, linear: str) -> None:
    text, held_out = tmp_path / "text.txt", tmp_path / "held_out.txt"
    lines = [
        f"{key} is the key of {value}" for key, value in zip("abcdefgh", "73194682", strict=True)
    ]
    text.write_text("\n".join(lines) + "\n")
    held_out.write_text("a is the key of 7\n")
    config = override(
        TINY,
        model={"linear": linear},
        data={
            "source": (str(text),),
            "validation_source": (str(held_out),),
            "documents": "line",
            "rows": "document",
            "sequence_length": 32,
        },
        optimizer={"lr": 2e-2},
        train={"steps": 150, "batch_size": 8, "eval_every_steps": 0, "save_every_steps": 0},
    )
    run(config, tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert losses[0] > 5  # ln 257 = 5.5
    # The key letter and the value of eight lines remain open: after the letter all is certain.
    assert losses[-1] < 0.05


# Recomputation


@pytest.mark.parametrize(
    ("policy", "precision"), [("replay", "fp32"), ("replay", "bf16"), ("block", "bf16-mixed")]
)
def test_a_run_with_recomputation_is_the_run_without_it(
    corpus: Path, tmp_path: Path, policy: str, precision: str
) -> None:
    """Losses, gradient norms, validation and weights; micro-batches add up, gradients are cut."""
    common = {"precision": precision, "micro_batch_size": 4}
    clip = {"clip_norm": 0.1}
    run(tiny(corpus, train=common, optimizer=clip), tmp_path / "none")
    again = {"recompute": policy}
    run(tiny(corpus, train=common | again, optimizer=clip), tmp_path / policy)
    for one, other in zip(rows_of(tmp_path / "none"), rows_of(tmp_path / policy), strict=True):
        drop = {"tokens_per_s", "peak_bytes"}
        assert {k: v for k, v in one.items() if k not in drop} == {
            k: v for k, v in other.items() if k not in drop
        }
    expected, actual = weights_of(tmp_path / "none"), weights_of(tmp_path / policy)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_run_killed_under_replay_may_go_on_without_it(corpus: Path, tmp_path: Path) -> None:
    """The policy is no part of what a resumed run must keep: it changes no number."""
    half = {"keep_checkpoints": 0}
    run(tiny(corpus, train=half), tmp_path / "whole")
    run(tiny(corpus, train=half | {"recompute": "replay"}), tmp_path / "parts")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step_{step}")
    run(tiny(corpus, train=half), tmp_path / "parts", resume=True)
    expected, actual = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_the_plan_is_in_the_manifest_and_the_guard_in_the_metrics(
    corpus: Path, tmp_path: Path
) -> None:
    """Eight blocks in bf16 with gains of 1: the bound passes the tolerance after a few."""
    deep = {"num_layers": 8}
    inverted = {"recompute": "invert", "precision": "bf16", "steps": 2}
    run(tiny(corpus, model=deep, train=inverted), tmp_path)
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["recompute"]["policy"] == "invert"
    assert manifest["recompute"]["tolerance"] == 0.05
    kept = [row for row in rows_of(tmp_path) if "invert_also_keeps" in row]
    assert kept[0]["step"] == 1
    assert set(kept[0]["invert_also_keeps"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert len(kept) == 1  # written where it changes, and the gains hardly moved


def test_auto_writes_down_what_it_chose(corpus: Path, tmp_path: Path) -> None:
    chosen = {"recompute": "auto", "activation_budget_gib": 1.0, "steps": 1}
    run(tiny(corpus, train=chosen), tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["recompute"]["policy"] == "none"


def test_auto_says_before_training_what_does_not_fit(corpus: Path, tmp_path: Path) -> None:
    tight = {"recompute": "auto", "activation_budget_gib": 1e-5}
    with pytest.raises(ConfigError, match="at least"):
        run(tiny(corpus, train=tight), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_seed_decides(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tiny(corpus, train={"seed": seed, "steps": 3}), tmp_path / name)
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")


# What stops a run


def test_non_finite_loss_stops_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = start.build
    monkeypatch.setattr(start, "build", lambda *a: built.append(build(*a)) or built[-1])
    config = tiny(
        corpus,
        optimizer={"lr": 1e30, "clip_norm": 0.0, "warmup_frac": 0.0},
        train={"steps": 40, "save_every_steps": 1, "eval_every_steps": 0},
    )
    with pytest.raises(TrainingError) as caught:
        run(config, tmp_path / "run")
    message = str(caught.value)
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    step = saved.progress.step + 1
    assert message.startswith(f"step {step}: ")
    assert f"positions {8 * (step - 1)} to {8 * step - 1}" in message
    assert str(saved.folder) in message
    weights = saved.weights()
    for name, parameter in built[0].named_parameters():
        # By bits, so that a weight which is not a number is equal to itself.
        ours = parameter.detach().view(torch.int32)
        assert torch.equal(ours, weights[name].view(torch.int32)), name
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == list(
        range(1, step)
    )


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_one_bad_number_is_enough(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Before any checkpoint; the bad number is put in at step 3, in the loss or a gradient only."""
    build, steps = start.build, iter(range(1, 100))

    def spoiled(*arguments: Any) -> Any:
        model = build(*arguments)
        forward = model.forward

        def call(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            loss, count = forward(tokens, targets)
            if model.training and next(steps) == 3:
                if where == "loss":
                    loss = loss + math.inf
                else:
                    loss.register_hook(lambda grad: grad * math.nan)
            return loss, count

        model.forward = call
        return model

    monkeypatch.setattr(start, "build", spoiled)
    with pytest.raises(TrainingError, match=r"step 3: .*positions 16 to 23") as caught:
        run(tiny(corpus), tmp_path / "run")
    assert "none was saved yet" in str(caught.value)
    assert ("loss inf" if where == "loss" else "gradient norm nan") in str(caught.value)
    assert len(losses_of(tmp_path / "run")) == 2


# Precision


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16-mixed", torch.float32), ("bf16", torch.bfloat16)],
)
@pytest.mark.parametrize("linear", LINEARS[:1])
def test_precision(
    corpus: Path, tmp_path: Path, precision: str, dtype: torch.dtype, linear: str
) -> None:
    config = tiny(corpus, model={"linear": linear}, train={"precision": precision, "steps": 5})
    result = run(config, tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 5
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert result.checkpoint is not None
    assert result.after is not None
    saved = checkpoint.load(result.checkpoint)
    dtypes = {name: weight.dtype for name, weight in saved.weights().items()}
    gains = {dtypes.pop(name) for name in list(dtypes) if name.endswith(".beta")}
    assert (gains, set(dtypes.values())) == ({torch.float32}, {dtype})
    prepared = prepare(config.data, progress=False)
    rows = Rows(prepared, "validation", 16, "packed")
    model = load_model(saved)
    set_dtype(model, torch.float32)
    assert evaluate(model, rows, config.data.validation_tokens) == result.after


# Options


@pytest.mark.filterwarnings("ignore")  # tensorboard's own, by its version
def test_tensorboard_has_every_figure(corpus: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tiny(corpus, train={"steps": 5, "tensorboard": True}), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm", "tokens", "val_loss", "val_perplexity"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        wanted = [(row["step"], row[key]) for row in rows_of(tmp_path / "run") if key in row]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        # Event files hold fp32.
        assert [value for _, value in found] == pytest.approx([v for _, v in wanted], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, by its version
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler on the CPU",
)
def test_compile_gives_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    sides = {
        "eager": {},
        "compiled": {"compile": True},
        "compiled-block": {"compile": True, "recompute": "block"},
    }
    for name, changes in sides.items():
        run(tiny(corpus, train={"steps": 4, **changes}), tmp_path / name)
    for name in sides:
        # Fused kernels round elsewhere; four steps amplify that.
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / "eager"), rel=1e-4)
        assert weights_of(tmp_path / name).keys() == weights_of(tmp_path / "eager").keys()
