"""Where does a model's loss come from? A run's checkpoints, looked into block by block.

    python runs/anatomy.py RUN [RUN ...] --out F [--rows 64]
    python runs/anatomy.py --quick --out F     # two steps of a tiny run, in a folder that goes

RUN: a run's folder with its checkpoints (``--train.keep-checkpoints 16`` keeps sixteen). At each of
them the first ROWS validation rows go forward and backward, in fp32. ``loss``: on those rows. Of
every map, over all their tokens:

    size             root mean square of its outputs Y
    gain             mean gain of the carry (0: it has none)
    carried          squared size of gain * Y_below over that of Y
    cosine           between gain * Y_below and what the map adds to it
    rank, carry_rank, added_rank
                     participation ratio (sum s^2)^2 / sum s^4 of the singular values s of Y, of the
                     carry, and of what is added: directions that carry the energy
    gradient         root mean square of the gradient of the map's factors or weight

and of every block the root mean square of the stream that it reads (``stream``), and of the
gradient that comes back to it (``stream_gradient``). Prints a table of the last checkpoint.

JSON: study, rows, code, runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sweep
import torch
from torch import Tensor, nn

from crnet.data.rows import validation_batches
from crnet.inference.load import load_model
from crnet.inference.on_rows import rows_of
from crnet.linears._maps import LinearMap
from crnet.markdown import markdown_table
from crnet.model.language_model import LanguageModel
from crnet.storage import checkpoint
from crnet.storage.checkpoint import Checkpoint
from crnet.storage.manifest import describe_code

Look = dict[str, float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="*")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def directions(y_NF: Tensor) -> float:
    """Participation ratio of the squared singular values; 0 of nothing."""
    squares = torch.linalg.eigvalsh(y_NF.T @ y_NF).clamp(min=0)
    total = float(squares.sum())
    return total**2 / float((squares**2).sum()) if total else 0.0


def rms(tensor: Tensor) -> float:
    return float(tensor.pow(2).mean().sqrt())


def gain_of(module: LinearMap) -> Tensor | None:
    """What the carry is multiplied by; None: the map has none."""
    beta = getattr(module, "beta", None)
    return None if beta is None else module._gain(beta).detach()  # type: ignore[operator]


def look(module: LinearMap, carry: Tensor | None, y: Tensor) -> Look:
    """Of a map's outputs."""
    y_NF, gain = y.detach().flatten(0, -2).double(), gain_of(module)
    found = {"size": rms(y_NF), "gain": 0.0, "carried": 0.0, "cosine": 0.0, "carry_rank": 0.0}
    found["rank"] = directions(y_NF)
    if gain is None or carry is None:
        return found | {"added_rank": found["rank"]}
    carried = carry.detach().flatten(0, -2).double() * gain.double()
    added = y_NF - carried
    inner = float((carried * added).sum())
    sizes = float(carried.norm() * added.norm())
    return found | {
        "gain": float(gain.mean()),
        "carried": float(carried.pow(2).sum() / y_NF.pow(2).sum()),
        "cosine": inner / sizes if sizes else 0.0,
        "carry_rank": directions(carried),
        "added_rank": directions(added),
    }


@contextmanager
def watched(model: LanguageModel, maps: dict[tuple[int, str], LinearMap]) -> Iterator[Any]:
    """What maps and blocks were given and gave, in the forward pass that comes."""
    looks: dict[tuple[int, str], Look] = {}
    streams: list[Tensor] = []

    def of_map(key: tuple[int, str]) -> Any:
        def hook(module: LinearMap, args: tuple[Any, ...], output: Any) -> None:
            looks[key] = look(module, args[1] if len(args) > 1 else None, output[0])

        return hook

    def of_block(_: nn.Module, args: tuple[Any, ...]) -> None:
        stream = next(each for each in args if isinstance(each, Tensor))
        stream.retain_grad()
        streams.append(stream)

    handles = [module.register_forward_hook(of_map(key)) for key, module in maps.items()]
    handles += [block.register_forward_pre_hook(of_block) for block in model.model.blocks()]
    try:
        yield looks, streams
    finally:
        for handle in handles:
            handle.remove()


def anatomy(saved: Checkpoint, rows: int) -> dict[str, Any]:
    """Of one checkpoint."""
    data = saved.config.data
    model = load_model(saved, torch.device("cpu"))
    count = rows * data.sequence_length
    ((tokens, targets),) = validation_batches(rows_of(saved, data), rows, count)
    spec = model.spec
    maps: Any = {
        (slot.layer_idx, slot.position): model.get_submodule(spec.map_name(slot))
        for block in spec.slots
        for slot in block
    }
    model.requires_grad_(True)
    with watched(model, maps) as (looks, streams):
        total, _ = model(tokens, targets)
    loss = total / targets.numel()
    loss.backward()
    blocks: list[Any] = [
        {"stream": rms(stream.detach()), "stream_gradient": rms(stream.grad)} for stream in streams
    ]
    for (block, position), module in maps.items():
        gradients = [
            each.grad.flatten() for each in module.parameters() if each.grad is not None
            and each.dim() > 1
        ]  # fmt: skip
        looks[block, position]["gradient"] = rms(torch.cat(gradients))
        blocks[block][position] = looks[block, position]
    return {"loss": round(loss.item(), 4), "blocks": blocks}


def render(name: str, found: dict[str, Any]) -> str:
    """The last checkpoint, means over the positions of a block."""
    step, last = list(found.items())[-1]
    keys = ("gain", "carried", "cosine", "size", "rank", "carry_rank", "added_rank", "gradient")
    lines = []
    for number, block in enumerate(last["blocks"], 1):
        maps = [value for value in block.values() if isinstance(value, dict)]
        means = [statistics.fmean(each[key] for each in maps) for key in keys]
        figures = [block["stream"], block["stream_gradient"], *means]
        lines.append([str(number), *(f"{each:.3g}" for each in figures)])
    table = markdown_table(["block", "stream", "its gradient", *keys], lines)
    return f"{name}, step {step}: loss {last['loss']:.4f}\n{table}"


def tiny_run(folder: Path) -> Path:
    """Two steps, each with its checkpoint."""
    words = [*sweep.shape_words(sweep.QUICK_SHAPE), *sweep.QUICK_COMMON, *sweep.QUICK_CORPUS]
    words += ["--model.linear=crnet", "--model.rank=4", "--train.steps=2"]
    words += ["--train.save-every-steps=1", "--train.keep-checkpoints=2"]
    problem = sweep.train_here(["train", "--out", str(folder / "crnet"), *words])
    assert problem is None, problem
    return folder / "crnet"


def report(runs: list[Path], rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for run in runs:
        name = f"{run.parent.name}/{run.name}" if run.name in found else run.name
        found[name] = {
            folder.name.removeprefix("step_"): anatomy(checkpoint.load(folder), rows)
            for folder in reversed(checkpoint.found(run))
        }
        print(render(name, found[name]), end="\n\n")
    return {"study": "anatomy", "rows": rows, "code": describe_code(), "runs": found}


def rounded(tree: Any) -> Any:
    """Four digits of every number: there are thousands."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


def main() -> None:
    given = arguments()
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            found = report([tiny_run(Path(folder))], 2)
    else:
        found = report(given.run, given.rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rounded(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
