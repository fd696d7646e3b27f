"""Golden losses: what ten steps of each method gave, on the machines where they were written down.

``python tests/golden.py`` writes them anew: only after a change that is meant to change the
numbers. With ``--keep`` it adds this environment to those that are written down.

The bits of a loss hang on more than this code: on torch, on the vector width that it uses, on how
many threads share a sum, and on the processor, for which torch's libraries choose their routines.
Where all of that is known, losses are compared by bits; elsewhere with the nearest entry, within
``TOLERANCE``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from crnet.config.sections import DataConfig, ModelConfig, RunConfig, TrainConfig
from crnet.config.serialize import override
from crnet.storage import metrics
from crnet.storage.manifest import describe_device
from crnet.train import run as train

METHODS = ("crnet", "full", "lowrank")
FILE = Path(__file__).with_name("golden_losses.json")
THREADS = 1
TOLERANCE = 2e-3
"""Relative: ten Adam steps amplify sums in another order, and a mistake moves losses by more."""

Losses = dict[str, list[float]]
"""``loss`` of each step and ``val_loss`` of each evaluation."""
Entries = dict[str, dict[str, Losses]]
"""Environment -> method -> losses."""

# Every number is given here, so that a change of a default is no change of these losses.
CONFIG = RunConfig(
    model=ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=2,
        rank="8",
        rope_theta=10_000.0,
        norm_eps=1e-6,
        init_std=0.02,
    ),
    data=DataConfig(documents="line", vocab_size=300, sequence_length=16, validation_tokens=600),
    train=TrainConfig(
        steps=10,
        batch_size=8,
        threads=THREADS,
        device="cpu",
        log_every_steps=1,
        eval_every_steps=5,
        save_every_steps=0,
    ),
)
OPTIONS = {
    "crnet": {"beta_init": 0.5, "init": "balanced", "lr_factor": 0.25},
    "lowrank": {"init": "balanced", "lr_factor": 0.25},
}
OPTIMIZER = {
    "lr": 5e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "warmup_frac": 0.1,
    "min_lr_frac": 0.1,
    "clip_norm": 1.0,
}


def environment() -> str:
    """What the bits of a loss hang on beside the code."""
    parts = (
        f"torch {torch.__version__}",
        torch.backends.cpu.get_cpu_capability(),
        f"{THREADS} thread",
        describe_device(torch.device("cpu")),
    )
    return "; ".join(parts)


def text() -> str:
    """Sums and products of small numbers in words and digits; nothing from outside this file."""
    words = "zero one two three four five six seven eight nine".split()
    lines = []
    for n in range(600):
        a, b = (7 * n + n // 11) % 10, (3 * n + n // 7) % 10
        lines.append(f"{words[a]} and {words[b]} make {a + b}, {a} times {b} is {a * b}.")
    return "\n".join(lines) + "\n"


def losses(method: str, folder: Path) -> Losses:
    """Ten steps of a method, in an empty folder."""
    corpus = folder / "golden.txt"
    corpus.write_text(text(), encoding="utf-8")
    options = {method: OPTIONS[method]} if method in OPTIONS else {}
    config = override(
        CONFIG,
        model={"linear": method, **options},
        data={"source": (str(corpus),), "cache_dir": folder / "cache"},
        optimizer=OPTIMIZER,
    )
    train.run(config, folder / "run", progress=False)
    rows = metrics.read(folder / "run" / "metrics.jsonl")
    return {key: [row[key] for row in rows if key in row] for key in ("loss", "val_loss")}


def nearest(key: str, known: Mapping[str, object]) -> str:
    """The environment that has most in common with ``key``; of several, the first."""
    parts = key.split("; ")
    return max(known, key=lambda each: sum(part in parts for part in each.split("; ")))


def compare(found: Losses, key: str, method: str, entries: Entries) -> str:
    """Hold losses against the golden ones; returns in words how they were compared.

    Raises:
        AssertionError: another bit where the environment is known, else more than ``TOLERANCE``.
    """
    if key in entries:
        assert found == entries[key][method], f"{method}: not the golden losses, bit for bit"
        return f"{method}: equal by bits"
    near = nearest(key, entries)
    golden = entries[near][method]
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert len(found[name]) == len(values)
        for idx, (ours, theirs) in enumerate(zip(found[name], values, strict=True)):
            assert abs(ours - theirs) <= TOLERANCE * abs(theirs), (
                f"{method}: {name} {idx} is {ours}, golden is {theirs} ({near})"
            )
    return f"{method}: no golden losses of {key!r}; within {TOLERANCE} of those of {near!r}"


def read() -> Entries:
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(*, keep: bool) -> None:
    """Write the losses of this environment; ``keep``: beside those of others, of the same code."""
    import tempfile

    torch.set_num_threads(THREADS)
    entry = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            entry[method] = losses(method, Path(folder))
    entries = (read() if keep else {}) | {environment(): entry}
    FILE.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--keep"]):
        sys.exit("usage: python tests/golden.py [--keep]")
    write(keep=sys.argv[1:] == ["--keep"])
