"""What is imported, and when: help at once, a first step soon.

Times are of the processor and of the best attempt: other programs use the machine too. The bounds
are several times what a quiet machine takes (help 0.25 s, a first step 4 s); what must not be
imported is exact.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from test_cli import train_words

HEAVY = {"torch", "numpy", "matplotlib", "transformers", "tokenizers", "safetensors"}
NOT_FOR_HELP = HEAVY | {"yaml", "rich.markdown", "crnet.config", "crnet.linears", "crnet.cost"}
NOT_FOR_TRAINING = {
    *("matplotlib", "transformers", "datasets", "pyarrow", "sentencepiece", "yaml"),
    "torch._dynamo",  # torch's compiler: it takes as long to import as torch
}


def imported(program: str) -> set[str]:
    """Modules that a Python program has imported at its end."""
    program = f"{program}\nimport sys\nsys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_of_the_program_imports_no_command(word: str) -> None:
    found = imported(
        "from crnet.__main__ import main\n"
        "try:\n"
        f"    main([{word!r}])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
    )
    assert "crnet.cli.app" in found
    assert sorted(NOT_FOR_HELP & found) == []


def test_what_trains_imports_no_picture_no_reader_and_no_compiler() -> None:
    """Two steps of every optimizer are taken, but of those whose package imports the compiler
    (bitsandbytes)."""
    found = imported(
        "import torch, crnet.train.run\n"
        "from crnet import optimizers\n"
        "from crnet.config.sections import OptimizerConfig, options_of\n"
        "from crnet.specs import TensorSpec, constant\n"
        "settings = optimizers.Settings(0.1, 0.9, 0.999, 1e-8, 0.1, 0)\n"
        "for name in {*optimizers.names()} - {'adam8bit', 'galore8bit'}:\n"
        "    method, weight = optimizers.get(name), torch.nn.Parameter(torch.ones(4, 4))\n"
        "    spec = TensorSpec((4, 4), 'matrix', constant(1.0))\n"
        "    options = options_of(OptimizerConfig(), name)\n"
        "    optimizer = method.build({'weight': (spec, weight)}, options, settings)\n"
        "    for _ in range(2):\n"
        "        weight.grad = torch.eye(4)\n"
        "        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
        "    optimizers.load_state(optimizer, optimizer.state_dict())\n"
        "    assert weight[0, 0] < weight[0, 1]\n"
    )
    assert "torch" in found
    assert sorted(NOT_FOR_TRAINING & found) == []


def seconds(words: Sequence[str], environ: dict[str, str]) -> float:
    """Of the processor, for ``crnet`` with these words."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "crnet", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick() -> None:
    assert min(seconds(["--help"], {}) for _ in range(3)) < 0.6


@pytest.mark.slow
def test_a_first_step_is_soon(corpus: Path, tmp_path: Path) -> None:
    """On a corpus that is prepared. Two evaluations and a checkpoint are within the time."""
    one = {"OMP_NUM_THREADS": "1"}
    words = [train_words(corpus, tmp_path / f"run{idx}", train__steps="1") for idx in range(3)]
    seconds(words[0], one)  # prepares the corpus
    assert min(seconds(each, one) for each in words[1:]) < 15
