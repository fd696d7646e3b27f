"""Reading and writing with a model: prompts, new tokens, evaluations; methods side by side.

    python benchmarks/decoding.py [--preset llama-60m] [--batch 8] [--prompt 128] [--out F]
    python benchmarks/decoding.py --quick [--out F]     # a tiny shape, two methods, one round

Random weights of the preset's shape, as many rows at a time, fp32. Methods take turns, round after
round; figures are medians over rounds (figure 3, middle, of the paper: micro-batch 64, 1B).

``prompt_tokens_per_s``: rows read into an empty cache. ``new_tokens_per_s``: tokens that follow,
one a row at a time, the likeliest. ``evaluation_tokens_per_s``: rows scored as an evaluation does
(loss and likeliest token); ``head_frac``: of that time, what is not the model without its head.
``cache_bytes``: keys and values of all rows at the end.

JSON: benchmark, date, command, options, processor, cores, code, load, sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heading import heading, write
from torch import Tensor

from crnet.config import presets
from crnet.config.model_spec import model_spec
from crnet.config.serialize import override
from crnet.cost.workload import resolved
from crnet.model.build import build
from crnet.model.language_model import LanguageModel

LINEARS = ("full", "crnet", "lowrank")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4, "rank": "8"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-60m")
    parser.add_argument("--linears", nargs="+", default=list(LINEARS))
    parser.add_argument("--batch", type=int, default=8, help="rows at a time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens written to each row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two methods, one round")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.linears = 1, list(LINEARS[:2])
        given.batch, given.prompt, given.new = 2, 16, 4
    return given


def model_of(given: argparse.Namespace, linear: str) -> LanguageModel:
    config = override(presets.get(given.preset), model={"linear": linear})
    if given.quick:
        config = override(config, model=TINY, data={"vocab_size": 512})
    spec = model_spec(resolved(config).model)
    return build(spec, seed=0, device=torch.device(given.device)).eval()


@torch.inference_mode()
def one_round(model: LanguageModel, rows: Tensor, num_new: int) -> dict[str, float]:
    """Figures of one pass over everything."""
    batch, length = rows.shape
    caches = model.new_caches(length + num_new)
    read_s, logits = timed(lambda: model.logits(rows, caches, last_only=True))

    def write() -> None:
        latest = logits
        for _ in range(num_new):
            latest = model.logits(latest[:, -1].argmax(-1, keepdim=True), caches, last_only=True)

    write_s, _ = timed(write)
    score_s, _ = timed(lambda: model.scores(rows, rows))
    hidden_s, _ = timed(lambda: model.hidden(rows))
    kept = [tensor for cache in caches for tensor in vars(cache).values()]
    return {
        "prompt_tokens_per_s": batch * length / read_s,
        "new_tokens_per_s": batch * num_new / write_s,
        "evaluation_tokens_per_s": batch * length / score_s,
        "head_frac": 1 - hidden_s / score_s,
        "cache_bytes": sum(each.nbytes for each in kept if isinstance(each, Tensor)),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start_s = time.perf_counter()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s, found


def main() -> None:
    given = arguments()
    load = {"before": os.getloadavg()[0]}
    models = {linear: model_of(given, linear) for linear in given.linears}
    draw = torch.Generator().manual_seed(0)
    rounds: dict[str, list[dict[str, float]]] = {linear: [] for linear in models}
    for number in range(given.rounds + 1):  # the first is a warm-up
        for linear, model in models.items():
            vocabulary = model.spec.shape.vocab_size
            rows = torch.randint(vocabulary, (given.batch, given.prompt), generator=draw)
            found = one_round(model, rows.to(given.device), given.new)
            if number:
                rounds[linear].append(found)
    load["after"] = os.getloadavg()[0]
    sides = {
        linear: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for linear, found in rounds.items()
    }
    print(f"{'tokens/s':10}{'prompt':>9}{'new':>9}{'evaluation':>12}{'head':>7}{'cache, MiB':>12}")
    for linear, it in sides.items():
        print(
            f"{linear:10}{it['prompt_tokens_per_s']:>9,.0f}{it['new_tokens_per_s']:>9,.0f}"
            f"{it['evaluation_tokens_per_s']:>12,.0f}{it['head_frac']:>7.0%}"
            f"{it['cache_bytes'] / 2**20:>12.1f}"
        )
    write(heading("decoding", given, given.device) | {"load": load, "sides": sides}, given.out)


if __name__ == "__main__":
    main()
