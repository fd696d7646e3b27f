"""Pictures of the cost model: memory and FLOPs of the parameterizations side by side."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from crnet import linears
from crnet.config.check import check
from crnet.config.sections import RunConfig
from crnet.cost import activations as cost
from crnet.cost import table as estimate
from crnet.errors import ConfigError

GIB = 2**30
STATES = ("weights", "gradients", "optimizer state")
FLOPS = ("blocks forward", "blocks backward", "recomputation", "head forward", "head backward")


def bars(config: RunConfig) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What the picture shows: (memory, FLOPs), each bar's parts from the bottom up.

    One bar for every parameterization and recompute policy that go together, all of the
    configuration's shape. ``--model.rank`` is kept where the parameterization can read it, else its
    ``aligned-parameters``, else a quarter of the hidden size.
    """
    memory: dict[str, dict[str, float]] = {}
    flops: dict[str, dict[str, float]] = {}
    for linear in linears.names():
        its = _readable(config, linear)
        step, states = estimate.step_of(its), estimate.state_bytes(its)
        for name, plan in estimate.policies(its).items():
            bar = f"{linear}, {name}"
            added = cost.added_at_first(step, plan)
            peak = cost.peak_activations(step, plan, added)
            kept = sum(cost.saved_activations(step, plan, added).values())
            memory[bar] = {term: states[term] / GIB for term in STATES} | {
                "activations kept": min(kept, peak) / GIB,
                "more at the peak": max(peak - kept, 0) / GIB,
            }
            counted = estimate.step_flops(its, plan)
            flops[bar] = {term: counted[term] for term in FLOPS}
    return memory, flops


def _readable(config: RunConfig, linear: str) -> RunConfig:
    for rank in (config.model.rank, "aligned-parameters", "0.25h"):
        model = dataclasses.replace(config.model, linear=linear, rank=rank)
        train = dataclasses.replace(
            config.train, recompute="none", recompute_layers=None, activation_budget_gib=None
        )
        its = estimate.resolved(dataclasses.replace(config, model=model, train=train))
        try:
            check(its)
        except ConfigError:
            continue
        return its
    raise ConfigError(f"no rank of {linear} suits this shape; give one with --model.rank")


def plot(config: RunConfig, path: Path) -> list[Path]:
    """Draw ``bars`` into PATH.png and PATH.svg (whatever ending ``path`` has); return both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    memory, flops = bars(config)
    step = estimate.step_of(config)
    figure, panes = pyplot.subplots(1, 2, figsize=(12, 0.36 * len(memory) + 1.6), sharey=True)
    for pane, parts, label in (
        (panes[0], memory, f"GiB at the peak, micro-batch {step.sequences} x {step.length}"),
        (panes[1], flops, "FLOPs of a step"),
    ):
        names = list(parts)[::-1]
        left = [0.0] * len(names)
        for term in parts[names[0]]:
            widths = [parts[name][term] for name in names]
            pane.barh(names, widths, left=left, label=term)
            left = [at + width for at, width in zip(left, widths, strict=True)]
        pane.set_xlabel(label)
        pane.grid(axis="x", alpha=0.3)
        pane.legend(fontsize=7)
    figure.suptitle(
        f"{config.preset}: hidden size {config.model.hidden_size}, "
        f"{config.model.num_layers} blocks, {config.train.precision}"
    )
    files = [path.with_suffix(ending) for ending in (".png", ".svg")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts of the user's machine
        figure.tight_layout()
        for file in files:
            figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return files
