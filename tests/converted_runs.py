"""What the processes of ``test_convert_parallel.py`` do.

    torchrun --nproc-per-node 2 tests/converted_runs.py FILE

A LLaMA with converted maps makes one step whole, and one as every wrapper has it, each process on
its half of the batch; FILE gets by how much gradients and weights differ, and what is refused.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import crnet
from shapes import random_tokens, tiny
from test_model import llama

LINEARS = ("crnet", "lax", "resformer")
"""Maps that read the block below, its bottleneck, and the first block."""
TOKENS = random_tokens(4, 12)


def converted(linear: str) -> Any:
    torch.manual_seed(0)  # of what is not converted
    model = llama(transformers, tiny(linear=linear))
    return crnet.convert_linears(model, linear, rank=4).double()


def by_parts_of_blocks(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block.self_attn)
        fully_shard(block.mlp)
    return fully_shard(model)


def by_blocks(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def stepped(model: Any, wrap: Callable[[Any], nn.Module], tokens: Tensor) -> dict[str, Tensor]:
    """Gradients and weights of one step."""
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(crnet.parameter_groups(model, lr=0.5))
    wrapped(tokens, labels=tokens, use_cache=False).loss.backward()
    found = {f"gradient of {n}": whole(p.grad) for n, p in model.named_parameters()}
    optimizer.step()
    return found | {name: whole(p.detach()) for name, p in model.named_parameters()}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Gradients over the largest of them, weights over theirs: where attention is nearly even,
    those of queries are rounding alone."""
    differences = []
    for is_gradient in (True, False):
        names = [each for each in wanted if each.startswith("gradient") == is_gradient]
        largest = max(float(wanted[name].abs().max()) for name in names)
        differences += [float((found[n] - wanted[n]).abs().max()) / largest for n in names]
    return max(differences)


def main(path: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    own = TOKENS.chunk(2)[distributed.get_rank()]
    seen: dict[str, Any] = {}
    for linear in LINEARS:
        wanted = stepped(converted(linear), lambda model: model, TOKENS)
        for name, wrap in (("ddp", DistributedDataParallel), ("fsdp", by_parts_of_blocks)):
            found = stepped(converted(linear), wrap, own)
            assert found.keys() == wanted.keys()
            seen[f"{linear} {name}"] = apart(found, wanted)
    try:
        stepped(converted("crnet"), by_blocks, own)
    except RuntimeError as refused:
        seen["by blocks"] = str(refused)
    if distributed.get_rank() == 0:
        path.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
