"""Converted maps under DDP, FSDP2 and torch.compile: the numbers of one process, eager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shapes import random_tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

HERE = Path(__file__).parent
TOLERANCE = 1e-6
"""Sums over two halves of a batch; transformers' norms compute in fp32 in an fp64 model too."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    path = tmp_path_factory.mktemp("converted") / "seen.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(HERE / "converted_runs.py"), str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src")},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes_are_one(seen: dict[str, Any], wrapper: str) -> None:
    """Gradients and weights after a step."""
    found = {name: each for name, each in seen.items() if name.endswith(wrapper)}
    assert len(found) == 3
    assert {name: each for name, each in found.items() if not each < TOLERANCE} == {}


def test_shards_around_blocks_say_what_to_shard_instead(seen: dict[str, Any]) -> None:
    assert "fully_shard goes around a block's self_attn and mlp" in seen["by blocks"]


@pytest.mark.parametrize("linear", ["crnet", "lax"])
def test_compiled_in_one_graph(linear: str) -> None:
    """Forward and backward without a break: the logits and gradients of eager, in fp64."""
    from converted_runs import converted

    torch._dynamo.reset()
    model, tokens = converted(linear), random_tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def passed(call: Any) -> dict[str, Any]:
        model.zero_grad()
        output = call(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        return found | {"logits": output.logits.detach()}

    wanted = passed(model)
    torch.testing.assert_close(passed(compiled), wanted, rtol=TOLERANCE, atol=TOLERANCE)
