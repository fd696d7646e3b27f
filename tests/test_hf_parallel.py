"""``tp_plan="auto"`` of transformers: two processes compute a model's maps in parts, as one does.

None is named here: a new method is covered the moment its file exists.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from crnet.config.check_tensor import parts_problems
from crnet.config.model_spec import model_spec
from crnet.errors import ConfigError
from crnet.hub.names import own_names
from shapes import make, one_of_every_method, random_tokens, randomised, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]

HERE = Path(__file__).parent
MODELS = one_of_every_method(intermediate_size=25)  # processes get unlike parts
SPECS = {name: model_spec(it) for name, it in MODELS.items()}
SHARED = [name for name, it in SPECS.items() if not (it.shared or list(parts_problems(it, 1)))]
WHOLE = [name for name in MODELS if name not in SHARED]
ODD = "refused-heads"
TOLERANCE = 1e-11
"""fp64: sums over two processes have another order."""


@pytest.fixture(scope="module")
def hf() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import crnet.hf

        return crnet.hf


@pytest.fixture(scope="module")
def seen(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw, by model."""
    folder = tmp_path_factory.mktemp("parts") / "models"
    for name, config in (MODELS | {ODD: tiny(num_kv_heads=1)}).items():
        model = hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(config), pad_token_id=0))
        model.load_state_dict(randomised(make(config), torch.float32).state_dict())
        model.save_pretrained(folder / name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", "2", str(HERE / "hf_parts.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src")},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_are_one(seen: list[dict[str, Any]], name: str) -> None:
    """Logits, gradients (recomputed too), greedy tokens, and what is saved, to the bit."""
    for each in seen:
        found = each[name]
        assert max(found["logits"], found["gradients"], found["recomputed"]) < TOLERANCE
        assert found["same text"]
        assert found["saved"]
        assert found["bytes"] < 0.97
    if name == "full-llama-residual":
        assert max(each[name]["bytes"] for each in seen) < 0.55


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_split_has_no_plan(seen: list[dict[str, Any]], name: str) -> None:
    assert "has no `tp_plan`" in seen[0][name]["refused"]


def test_heads_that_cannot_be_dealt_out_are_refused(seen: list[dict[str, Any]]) -> None:
    assert "tp_size is 2, and the model has 4 heads, 1 of keys" in seen[0][ODD]["refused"]


def test_the_plan_is_told_and_not_saved(hf: Any) -> None:
    config = hf.CRNetConfig(crnet=own_names(tiny()))
    maps = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    plan = config.base_model_tp_plan
    assert {name.rpartition(".")[2] for name in plan} == maps
    rows = {name for name, style in plan.items() if style == "crnet_rows"}
    assert rows == {"layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"}
    assert "base_model_tp_plan" not in config.to_dict()
    model = hf.CRNetForCausalLM(config)
    assert model.tp_plan["model.layers.*.mlp.down_proj"] == "crnet_rows"
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    assert (
        hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(tiny(linear="sltrain")))).tp_plan == {}
    )


@torch.no_grad()
def test_an_engine_that_gives_a_part_of_the_heads_is_refused(hf: Any) -> None:
    """vLLM's tensor parallel splits nn.Linear alone: maps would stay whole, and a part of the
    heads would get all queries."""

    class Instance:
        num_heads = 2

    model = hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(tiny()))).model
    instances = dict.fromkeys(range(3), Instance())
    with pytest.raises(ConfigError, match="tensor-parallel size of 1"):
        model(input_ids=random_tokens(1, 9), use_cache=False, attention_instances=instances)
