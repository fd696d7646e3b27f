"""Every method from the command line: trained, resumed to the bit, evaluated, and made to write.

The runs are a covering set, not the product: each parameterization once, and beside it every
stream, optimizer, schedule, architecture, precision and recompute policy in turn. No method is
named here.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from crnet import architectures, linears, optimizers, schedules, streams
from crnet.cli.app import main
from crnet.config.check import check, policy_problem, spec_problems
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.cost.workload import problems_of
from crnet.errors import ConfigError
from crnet.recompute.plan import POLICIES
from crnet.storage import checkpoint, metrics

PRECISIONS = ("fp32", "bf16-mixed", "bf16")
BASE = override(
    RunConfig(),
    model={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "rank": "4",
        "vocab_size": 300,
    },
    data={"sequence_length": 16},
)


@dataclass(frozen=True)
class Choice:
    """The methods of one run."""

    linear: str
    stream: str
    architecture: str
    optimizer: str
    schedule: str
    precision: str
    policy: str

    def words(self) -> list[str]:
        return [
            *("--model.linear", self.linear),
            *("--model.stream", self.stream),
            *("--model.architecture", self.architecture),
            *("--optimizer.name", self.optimizer),
            *("--optimizer.schedule", self.schedule),
            *("--train.precision", self.precision),
            *("--train.recompute", self.policy),
        ]


def refusal(linear: str, stream: str, policy: str) -> str | None:
    config = override(BASE, model={"linear": linear, "stream": stream})
    return policy_problem(model_spec(config.model), policy)


def goes(linear: str, stream: str, policy: str, architecture: str) -> bool:
    """Whether the architecture can have the rest."""
    keys = {"linear": linear, "stream": stream, "architecture": architecture}
    spec = model_spec(override(BASE, model=keys).model)
    return not spec_problems(spec) and policy_problem(spec, policy) is None


def optimizers_of(linear: str) -> list[str]:
    """Those that the parameterization can have, first those that not every one can."""
    names = sorted(optimizers.names(), key=lambda name: not optimizers.get(name).steps_pairs)
    keys = [{"model": {"linear": linear}, "optimizer": {"name": name}} for name in names]
    problems = [problems_of(override(BASE, **each)) for each in keys]
    return [name for name, found in zip(names, problems, strict=True) if not found]


def choices() -> list[Choice]:
    """One run a parameterization: the policy that was used least, of several the one that fewest
    can have, and beside it the stream and the optimizer that were used least; the rest in turn."""
    used: Counter[str] = Counter()
    found = []
    rarest_first = POLICIES[::-1]
    for idx, linear in enumerate(linears.names()):
        pairs = itertools.product(rarest_first, streams.names())
        allowed = [(p, s) for p, s in pairs if refusal(linear, s, p) is None]
        least = min(used[policy] for policy, _ in allowed)
        policy = next(policy for policy, _ in allowed if used[policy] == least)
        stream = min((s for p, s in allowed if p == policy), key=lambda name: used[name])
        optimizer = min(optimizers_of(linear), key=lambda name: used[name])
        used.update((policy, stream, optimizer))

        def turn(names, idx=idx):
            """Another one each time, out of step with those of other lengths."""
            return names[(idx + idx // len(names)) % len(names)]

        found.append(
            Choice(
                linear,
                stream,
                next(
                    name
                    for more in range(len(architectures.names()))
                    if goes(linear, stream, policy, name := turn(architectures.names(), idx + more))
                ),
                optimizer,
                schedules.names()[idx % len(schedules.names())],
                turn(PRECISIONS),
                policy,
            )
        )
    return found


CHOICES = choices()


def test_the_runs_cover_every_method():
    for key, names in {
        "linear": linears.names(),
        "stream": streams.names(),
        "architecture": architectures.names(),
        "optimizer": optimizers.names(),
        "schedule": schedules.names(),
        "precision": PRECISIONS,
        "policy": POLICIES,
    }.items():
        assert {getattr(choice, key) for choice in CHOICES} == {*names}, key


def call(*words: str) -> None:
    """The command ends well."""
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code == 0


def train(corpus: Path, out: Path, choice: Choice) -> None:
    call(
        *("train", "--out", str(out), "--data.source", str(corpus), *choice.words()),
        *("--data.documents", "paragraph", "--data.vocab-size", "300"),
        *("--data.sequence-length", "16", "--data.validation-tokens", "160"),
        *("--model.hidden-size", "16", "--model.intermediate-size", "24"),
        *("--model.num-layers", "2", "--model.num-heads", "2", "--model.rank", "4"),
        *("--train.steps", "6", "--train.batch-size", "4"),
        *("--train.save-every-steps", "3", "--train.eval-every-steps", "3"),
        *("--train.log-every-steps", "1", "--train.threads", "1", "--train.device", "cpu"),
    )


def figures(folder: Path) -> list[dict]:
    rows = metrics.read(folder / "metrics.jsonl")
    return [
        {key: row[key] for key in row if key not in ("tokens_per_s", "peak_bytes")} for row in rows
    ]


@pytest.mark.parametrize(
    "choice",
    [  # CR-Net here, the others among the slow tests
        pytest.param(each, marks=[] if each.linear == "crnet" else [pytest.mark.slow])
        for each in CHOICES
    ],
    ids=lambda choice: choice.linear,
)
def test_a_run(choice: Choice, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A run that stood still after 3 of 6 steps ends in the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(corpus, whole, choice)
    later = shutil.ignore_patterns("step_6")
    shutil.copytree(whole, parts, ignore=later)
    call("train", "--resume", "--out", str(parts))
    ends = [checkpoint.load(run / "checkpoints" / "step_6") for run in (whole, parts)]
    expected, actual = (end.weights() for end in ends)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    begun = checkpoint.load(whole / "checkpoints" / "step_3").weights()
    assert any(not torch.equal(expected[name], begun[name]) for name in expected)
    assert ends[0].progress == ends[1].progress
    assert figures(whole) == figures(parts)

    capsys.readouterr()
    call("evaluate", str(parts), "--json")
    evaluated = json.loads(capsys.readouterr().out)
    last = [row for row in figures(whole) if "val_loss" in row][-1]
    assert evaluated["val_loss"] == last["val_loss"]

    words = ["--prompt", "The parser", "--max-tokens", "8", "--greedy", "--no-stop-at-end"]
    call("generate", str(parts), "--json", *words)
    cached = json.loads(capsys.readouterr().out)["text"]
    assert cached
    if choice.precision != "bf16":  # products of other shapes may round to another token
        call("generate", str(parts), "--json", *words, "--no-use-cache")
        assert json.loads(capsys.readouterr().out)["text"] == cached


def test_refused_policies(capsys: pytest.CaptureFixture[str]):
    """A policy that a method cannot have is refused before anything is read, and the message names
    both; others are let through. The command line says the same, with exit code 2: it is asked
    once for each policy and seam, for time."""
    plain = max(streams.names(), key=lambda name: len(streams.get(name).policies))
    able = next(name for name in linears.names() if not refusal(name, plain, "invert"))
    pairs = {(linear, plain, linear) for linear in linears.names()}
    pairs |= {(able, stream, stream) for stream in streams.names()}
    asked: set[tuple[str, bool]] = set()
    for (linear, stream, method), policy in itertools.product(sorted(pairs), POLICIES):
        config = override(
            BASE, model={"linear": linear, "stream": stream}, train={"recompute": policy}
        )
        if refusal(linear, stream, policy) is None:
            check(config)
            continue
        with pytest.raises(ConfigError) as caught:
            check(config)
        (problem,) = caught.value.problems
        assert f"--train.recompute {policy}" in problem
        assert f" {method} " in problem
        if (policy, method == stream) in asked:
            continue
        asked.add((policy, method == stream))
        words = ["--model.linear", linear, "--model.stream", stream, "--train.recompute", policy]
        with pytest.raises(SystemExit) as ended:
            main(["train", *words, "--out", "/nowhere/run"])
        assert ended.value.code == 2
        assert problem in capsys.readouterr().err
    assert asked
