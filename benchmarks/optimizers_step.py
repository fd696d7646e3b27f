"""The update of every optimizer at one shape, as a ratio to torch's fused AdamW.

    python benchmarks/optimizers_step.py [--preset llama-130m] [--optimizers apollo,fira] [--out F]
    python benchmarks/optimizers_step.py --quick [--out F]     # a tiny shape, a few seconds

An update is ``optimizer.step()`` alone, of all tensors of a model as a run hands them over. Groups
of optimizers and AdamW step one model in turn, round after round, on that round's gradients of a
batch of random tokens; full rank, and CR-Net for optimizers that step pairs of factors. The first
round makes states and is not timed. ``ratio`` is the median over rounds of an update's time over
AdamW's in the same round. Seconds are of processor time, on one thread unless told otherwise: other
programs on the machine disturb them least.

A refresh (a new projection, an exact step) is due every third step here and is timed apart:
``refresh_s``. Where an optimizer can stagger its refreshes, ``staggered`` is one that does, every
step of which refreshes one matrix: its longest step over the median without a refresh.

``floor_s`` is what no way of computing the update goes below: the products that it consists of,
timed alone in the same rounds (``products_s``), and AdamW's time for as many bytes of weight,
gradient and state as have to be read and written (``traffic_s``). The process has malloc and
waiting threads as ``crnet train`` has them.

JSON: benchmark, date, command, options, processor, cores, code, load, items, adamw, optimizers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crnet.cli import environment

if __name__ == "__main__":
    environment.as_trained()

import methods_step
import torch
from heading import heading, write
from torch import Tensor

from crnet import optimizers
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig, choose, field_name, options_of
from crnet.config.serialize import override
from crnet.specs import TensorSpec
from crnet.train import run as train
from crnet.train.step import Step, make_optimizer

QUICK = "--preset tiny --layers 2 --rounds 3 --vocab-size 64"
BASE = "adamw"
LR = 1e-6
"""So that the weights stay what they are."""
EVERY = 3
"""Steps between two refreshes."""
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "apollo": {"apollo kept": {"projection": "kept"}},
    "flora": {"flora kept": {"projection": "kept"}},
}
"""More entries for an optimizer: what they are called, and the options that differ."""
LAST_OF_PERIOD = ("exact_every", "flora")
"""Options, or optimizers, whose refresh is the last step of a period; else the first."""

Product = tuple[int, int, int]
"""(m, k, n): of a matrix (m, k) and one of (k, n)."""


def subspace(count: int) -> Callable[[TensorSpec, Any], list[Product]]:
    """Products with a projection: down to its rank, or back."""

    def of(spec: TensorSpec, options: Any) -> list[Product]:
        low, high = sorted(spec.shape)[-2:] if len(spec.shape) > 1 else (0, 0)
        return [(high, low, min(options.rank, low))] * count if spec.role == "matrix" else []

    return of


def iterations(spec: TensorSpec, ways: Sequence[str], more: int = 0) -> list[Product]:
    """Five Newton-Schulz iterations on a matrix or on its Gram matrix, whichever takes less; and
    so many products with the smaller side's square besides."""
    small, large = sorted(spec.shape)
    on_gram = [(small, large, small), (large, small, small)] + 17 * [(small, small, small)]
    on_matrix = 5 * [(small, large, small), (small, small, small), (small, small, large)]
    given = {"gram": on_gram, "matrix": on_matrix}
    least = min((given[way] for way in ways), key=lambda it: sum(m * k * n for m, k, n in it))
    return least + more * [(large, small, small)]


def orthogonalised(spec: TensorSpec, options: Any) -> list[Product]:
    """Of Muon's way: every matrix that it takes."""
    return iterations(spec, ("gram", "matrix")) if options.takes(spec) else []


def of_pairs(more: int) -> Callable[[TensorSpec, Any], list[Product]]:
    """Of a step of a pair: each factor by itself."""

    def of(spec: TensorSpec, options: Any) -> list[Product]:
        return iterations(spec, ("gram", "matrix"), more) if spec.partner else []

    return of


PRODUCTS: dict[str, Callable[[TensorSpec, Any], list[Product]]] = {
    "apollo": subspace(1),
    "apollo-mini": subspace(1),
    "dct-adamw": subspace(1),
    "fira": subspace(2),
    "flora": subspace(2),
    "galore": subspace(2),
    "galore8bit": subspace(2),
    "golore": subspace(2),
    "gradnorm-lorp": subspace(2),
    "lora-muon": of_pairs(2),
    "muon": orthogonalised,
    "normuon": orthogonalised,
    "spectron": of_pairs(0),
}
"""Of one tensor's update without a refresh. An optimizer that is not here has none."""


def timed(work: Callable[[], Any]) -> float:
    """Seconds of processor time."""
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


class Products:
    """Products alone, each shape once a round, for all optimizers together."""

    def __init__(self) -> None:
        self.seconds: dict[Product, list[float]] = {}
        self.operands: dict[Product, list[Tensor]] = {}

    def add(self, product: Product) -> None:
        if product not in self.operands:
            m, k, n = product
            self.operands[product] = [torch.rand(m, k), torch.rand(k, n), torch.empty(m, n)]
            self.seconds[product] = []

    def run(self) -> None:
        for product, (one, other, out) in self.operands.items():
            took = [timed(lambda: torch.mm(one, other, out=out)) for _ in range(3)]  # noqa: B023
            self.seconds[product].append(min(took))

    def total(self, counts: Counter[Product]) -> float:
        return sum(count * statistics.median(self.seconds[each]) for each, count in counts.items())


class Side:
    """One optimizer on a model that others step too, and its times."""

    def __init__(self, config: RunConfig, model: Any, refreshes: bool):
        self.optimizer = make_optimizer(config, model)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * group["lr_factor"]
        name = config.optimizer.name
        self.last = name in LAST_OF_PERIOD or any(
            hasattr(options_of(config.optimizer, name), each) for each in LAST_OF_PERIOD
        )
        self.refreshes = refreshes
        self.usual: list[float | None] = []
        """None: a refresh."""
        self.refresh: list[float] = []
        self.config = config

    def run(self) -> None:
        step = len(self.usual) + 1
        took = timed(self.optimizer.step)
        is_due = self.refreshes and (step if self.last else step - 1) % EVERY == 0
        self.usual.append(None if is_due else took)
        if is_due and step > 1:
            self.refresh.append(took)

    def usual_s(self) -> float:
        return statistics.median(each for each in self.usual[1:] if each is not None)


def period_of(config: RunConfig) -> str | None:
    """The option that says how far apart an optimizer's refreshes are; none where every step is
    one."""
    options = options_of(config.optimizer, config.optimizer.name)
    for key in ("refresh_every", "exact_every"):
        if getattr(options, key, 1) > 1:
            return key
    return None


def changed(config: RunConfig, **options: Any) -> RunConfig:
    """With other options of its optimizer."""
    key = field_name(config.optimizer.name)
    made = override(config, optimizer={key: options}) if options else config
    check(made)
    return made


def entries(base: RunConfig, wanted: Sequence[str]) -> Iterator[tuple[str, RunConfig]]:
    """Every optimizer, and its variants, with the parameterization that it steps here."""
    for name in optimizers.names():
        if name == BASE or (wanted and name not in wanted):
            continue
        linear = "crnet" if optimizers.get(name).steps_pairs else "full"
        config = dataclasses.replace(
            base,
            model=choose(base.model, "linear", linear),
            optimizer=choose(base.optimizer, "name", name),
        )
        for key, options in ({name: {}} | VARIANTS.get(name, {})).items():
            yield key, changed(config, **options)


def counted(config: RunConfig, model: Any) -> Counter[Product]:
    """The products of an update."""
    name = config.optimizer.name
    options = options_of(config.optimizer, name)
    of = PRODUCTS.get(name, lambda spec, options: [])
    return Counter(each for spec, _ in model.trained().values() for each in of(spec, options))


def traffic(config: RunConfig, model: Any) -> int:
    """Bytes of weight, gradient and state that an update reads and writes."""
    name = config.optimizer.name
    method, options = optimizers.get(name), options_of(config.optimizer, name)
    specs = [spec for spec, _ in model.trained().values()]
    state = sum(method.state_bytes(spec, options, 4) for spec in specs)
    return 3 * 4 * sum(spec.num_items for spec in specs) + 2 * state


class Round:
    """A model's gradients of one batch after another."""

    def __init__(self, step: Step, given: argparse.Namespace):
        self.step, self.given, self.idx = step, given, 0

    def gradients(self) -> None:
        generator = torch.Generator().manual_seed(self.idx)
        self.idx += 1
        shape, size = (self.given.sequences, self.given.length), self.given.vocab_size
        tokens, targets = (torch.randint(0, size, shape, generator=generator) for _ in range(2))
        self.step.optimizer.zero_grad(set_to_none=False)
        loss_sum, num_tokens = self.step.model(tokens, targets)
        (loss_sum / num_tokens).backward()


def group_figures(
    group: Sequence[tuple[str, RunConfig]], round_: Round, products: Products, rounds: int
) -> tuple[dict[str, Any], float, int]:
    """The entries of a group beside AdamW; AdamW's time; and items."""
    model = round_.step.model
    adamw_config = dataclasses.replace(
        group[0][1], optimizer=choose(group[0][1].optimizer, "name", BASE)
    )
    adamw = Side(adamw_config, model, False)
    sides: dict[str, Side] = {}
    staggered: dict[str, Side] = {}
    counts: dict[str, Counter[Product]] = {}
    for key, config in group:
        period = period_of(config)
        sides[key] = Side(
            changed(config, **{period: EVERY}) if period else config, model, period is not None
        )
        if period and hasattr(options_of(config.optimizer, config.optimizer.name), "stagger"):
            staggered[key] = Side(changed(config, stagger=True), model, False)
        counts[key] = counted(config, model)
        for product in counts[key]:
            products.add(product)
    for _ in range(rounds + 1):
        round_.gradients()
        for side in (adamw, *sides.values(), *staggered.values()):
            side.run()
        products.run()
    adamw_s = adamw.usual_s()
    bytes_adamw = traffic(adamw_config, model)
    found = {}
    for key, side in sides.items():
        ratios = [
            mine / theirs
            for mine, theirs in zip(side.usual[1:], adamw.usual[1:], strict=True)
            if mine is not None and theirs is not None
        ]
        ratio = statistics.median(ratios)
        products_s = products.total(counts[key])
        traffic_s = adamw_s * traffic(side.config, model) / bytes_adamw
        floor_s = products_s + traffic_s
        found[key] = {
            "linear": side.config.model.linear,
            "update_s": round(side.usual_s(), 4),
            "ratio": round(ratio, 3),
            "spread": [round(each, 3) for each in (min(ratios), max(ratios))],
            "products_s": round(products_s, 4),
            "traffic_s": round(traffic_s, 4),
            "floor_s": round(floor_s, 4),
            "floor_ratio": round(floor_s / adamw_s, 3),
            "refresh_s": round(statistics.median(side.refresh), 4) if side.refresh else None,
            "staggered": _staggered(staggered[key], side) if key in staggered else None,
        }
    items = sum(spec.num_items for spec, _ in model.trained().values())
    return found, adamw_s, items


def _staggered(side: Side, usual: Side) -> dict[str, float]:
    """Every step of ``side`` refreshes a matrix."""
    steps = [each for each in side.usual[1:] if each is not None]
    return {
        "median_s": round(statistics.median(steps), 4),
        "longest_s": round(max(steps), 4),
        "longest_over_usual": round(max(steps) / usual.usual_s(), 3),
    }


def measure(base: RunConfig, given: argparse.Namespace) -> dict[str, Any]:
    """Parameterization by parameterization, as many optimizers at a time as memory holds."""
    wanted = given.optimizers.split(",") if given.optimizers else []
    found: dict[str, Any] = {}
    adamw: dict[str, float] = {}
    items: dict[str, int] = {}
    by_linear: dict[str, list[tuple[str, RunConfig]]] = {}
    for key, config in entries(base, wanted):
        by_linear.setdefault(config.model.linear, []).append((key, config))
    for linear, left in by_linear.items():
        config = dataclasses.replace(left[0][1], optimizer=base.optimizer)
        step = train.make_step(config, model_spec(config.model), torch.device("cpu"), None)
        round_, products = Round(step, given), Products()
        while left:
            group, left = left[: given.group], left[given.group :]
            made, adamw_s, items[linear] = group_figures(group, round_, products, given.rounds)
            adamw.setdefault(linear, round(adamw_s, 4))
            found |= made
            for key, line in made.items():
                stagger = (line["staggered"] or {}).get("longest_over_usual", "")
                print(
                    f"{key:16} {line['update_s']:8.4f} {line['ratio']:8.2f}"
                    f" {line['floor_ratio']:8.2f} {line['refresh_s'] or '':8} {stagger}",
                    flush=True,
                )
    return {
        "load": round(os.getloadavg()[0], 2),
        "items": items,
        "adamw": adamw,
        "optimizers": dict(sorted(found.items())),
    }


def base_config(given: argparse.Namespace) -> RunConfig:
    """The preset, in one batch."""
    found = methods_step.base_config(given)
    return override(found, optimizer={"weight_decay": given.weight_decay})


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-130m")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--group", type=int, default=3, help="optimizers in memory beside AdamW")
    parser.add_argument("--optimizers", help="names with commas; none: all")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    return parser.parse_args(QUICK.split(), given) if given.quick else given


def main() -> None:
    given = read_arguments()
    torch.set_num_threads(given.threads)
    report = heading("optimizers_step", given) | measure(base_config(given), given)
    write(report, given.out)


if __name__ == "__main__":
    main()
