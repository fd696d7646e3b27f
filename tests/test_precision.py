"""Which precision a run has, and what it sets on its device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crnet.cli.app import main
from crnet.config import presets
from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.config.serialize import override
from crnet.errors import ConfigError
from crnet.model import device
from crnet.storage import checkpoint
from test_train import run, tiny


def test_auto_is_fp32_on_a_cpu_and_is_written_down(corpus: Path, tmp_path: Path):
    config = tiny(corpus, train={"steps": 1})
    assert config.train.precision == "auto"
    run(config, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["config"]["train"]["precision"] == "fp32"
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    assert saved.config.train.precision == "fp32"


def test_auto_is_mixed_on_a_gpu():
    config = device.with_precision(RunConfig(), torch.device("cuda"))
    assert config.train.precision == "bf16-mixed"
    chosen = override(RunConfig(), train={"precision": "bf16"})
    assert device.with_precision(chosen, torch.device("cuda")) == chosen


def test_every_preset_leaves_the_precision_to_the_device():
    assert {recipe.train.precision for _, recipe in presets.PRESETS.values()} == {"auto"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "fp32"),
        (["--device", "h100"], "bf16-mixed"),
        (["--device", "cpu"], "fp32"),
        (["--device", "h100", "--train.precision", "bf16"], "bf16"),
        (["--train.device", "cuda"], "bf16-mixed"),
    ],
)
def test_cost_says_which_precision_it_took(
    words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(["cost", "llama-60m", "--json", *words])
    assert not ended.value.code
    titles = json.loads(capsys.readouterr().out)["titles"]
    assert titles["state"] == f"state, GiB; {wanted}"


def test_a_choice_without_effect_is_refused():
    config = override(RunConfig(), train={"precision": "bf16-mixed", "bf16_update": "plain"})
    with pytest.raises(ConfigError, match=r"^--train\.bf16-update plain has no effect"):
        check(config)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_a_cpu_without_bf16_products_is_told_once(
    precision: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    config = override(RunConfig(), train={"precision": precision})
    for has_fast in (False, True):
        monkeypatch.setattr(device, "has_fast_bf16", lambda has_fast=has_fast: has_fast)
        device.prepare_device(config, torch.device("cpu"))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (precision != "fp32" and not has_fast)
        assert all("--train.precision fp32" in line for line in lines)


@pytest.mark.parametrize(("tf32", "wanted"), [(True, "high"), (False, "highest")])
def test_a_gpu_takes_tf32_where_it_may(tf32: bool, wanted: str):
    """torch's switches can be set without a GPU; a CPU run sets none."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    config = override(RunConfig(), train={"tf32": tf32, "precision": "fp32"})
    try:
        device.prepare_device(config, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == before[0]
        device.prepare_device(config, torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == wanted
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]
