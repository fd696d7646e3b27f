"""What the processes of ``test_hf_parallel.py`` do.

    torchrun --nproc-per-node 2 tests/hf_parts.py FOLDER

Each model of the folder is opened whole, and in parts by all processes; ``seen-RANK.json`` says by
how much they differ, in fp64, where rounding leaves twelve digits.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import crnet.hf  # noqa: F401
from shapes import random_tokens

TOKENS = random_tokens(2, 9)
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
STATIC = {"cache_implementation": "static", "disable_compile": True}
Found = dict[str, Any]


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def apart(found: Tensor, wanted: Tensor, scale: float | None = None) -> float:
    return float((found - wanted).abs().max() / (scale or wanted.abs().max()))


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return {name: each for name, each in found.items() if each is not None}


def gradients_apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over the largest of the whole model: a key's bias has none but rounding."""
    assert found.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values())
    return max(apart(found[name], wanted[name], largest) for name in wanted)


def bytes_of(model: Any) -> int:
    return sum(
        (it.to_local() if isinstance(it, DTensor) else it).nbytes for it in model.parameters()
    )


def compared(folder: Path, out: Path) -> Found:
    opened = transformers.AutoModelForCausalLM.from_pretrained
    one = opened(folder).double()
    shared = DistributedConfig(tp_plan="auto", tp_size=torch.distributed.get_world_size())
    two = opened(folder, distributed_config=shared).double()
    with torch.no_grad():
        seen: Found = {"logits": apart(two(TOKENS).logits, one(TOKENS).logits)}
    wanted = gradients(one)
    seen["gradients"] = gradients_apart(gradients(two), wanted)
    two.train()
    two.activation_checkpointing_enable()  # the policy block
    seen["recomputed"] = gradients_apart(gradients(two), wanted)
    two.activation_checkpointing_disable()
    two.eval()
    seen["bytes"] = bytes_of(two) / bytes_of(one)
    generated = [each.generate(TOKENS, **GREEDY).tolist() for each in (one, two)]
    generated.append(two.generate(TOKENS, **GREEDY, **STATIC).tolist())
    seen["same text"] = generated[0] == generated[1] == generated[2]
    two.save_pretrained(out)
    torch.distributed.barrier()
    back = dict(opened(out).named_parameters())
    seen["saved"] = all(torch.equal(back[name], it) for name, it in one.named_parameters())
    return seen


def refused(folder: Path) -> str:
    """By the words that were transformers' first: ``tp_plan="auto"`` alone."""
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    seen: dict[str, Found] = {}
    for path in sorted(each for each in folder.iterdir() if each.is_dir()):
        config = transformers.AutoConfig.from_pretrained(path)
        if config.base_model_tp_plan is None or path.name.startswith("refused"):
            seen[path.name] = {"refused": refused(path)}
        else:
            seen[path.name] = compared(path, folder.parent / "saved" / path.name)
    (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
