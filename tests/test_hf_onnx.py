"""The model in torch.export and in ONNX: the logits of the model, rows of any number and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crnet.hub.names import own_names
from shapes import make, random_tokens, randomised, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


class Logits(nn.Module):
    """As docs/transformers.md shows it."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def test_exported_and_run_in_onnxruntime(tmp_path: Path) -> None:
    """Tolerances: torch's own graph has the bits; onnxruntime has other kernels."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    import crnet.hf

    config = tiny()
    model = crnet.hf.CRNetForCausalLM(crnet.hf.CRNetConfig(crnet=own_names(config))).eval()
    model.load_state_dict(randomised(make(config), torch.float32).state_dict())
    any_size = torch.export.Dim.DYNAMIC
    shapes = {"input_ids": {0: any_size, 1: any_size}}
    program = torch.export.export(Logits(model), (random_tokens(2, 8),), dynamic_shapes=shapes)
    tokens = random_tokens(3, 13, seed=5)
    wanted = model(tokens).logits
    torch.testing.assert_close(program.module()(tokens), wanted, rtol=0, atol=0)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)  # pyright: ignore
    (found,) = onnxruntime.InferenceSession(path).run(None, {"input_ids": tokens.numpy()})
    scale = float(wanted.abs().max())
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5 * scale)
