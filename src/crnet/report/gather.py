"""What a run folder tells, as plain numbers and words: what ``crnet report`` shows.

Everything is read from files; the run may be going on meanwhile. A file that is damaged costs what
stands in it and is named among the run's ``problems``; only a folder without a run is refused.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crnet.config import presets
from crnet.config.model_spec import ModelSpec
from crnet.config.sections import RunConfig, precision_of
from crnet.config.serialize import flags, leaves, to_dict
from crnet.cost.step import step_flops, step_memory
from crnet.cost.workload import Workload, workload
from crnet.errors import ConfigError
from crnet.report.folder import RunFolder, config_of, manifest_of, named
from crnet.storage import checkpoint, metrics
from crnet.storage.checkpoint import Checkpoint
from crnet.storage.files import held_by
from crnet.storage.metrics import Row

MOST_ROWS = 2000
"""Rows of a curve that are handed on; of more, the lowest and the highest of every bunch."""

Values = dict[str, Any]
"""What JSON can hold, by name; a figure that is not finite is null there."""


@dataclass(frozen=True, kw_only=True)
class Run(RunFolder):
    """A run folder that has been read, with all that follows from its configuration."""

    manifest: Values
    work: Workload
    saved: Checkpoint | None
    """The newest whole checkpoint."""

    def spec_at(self, step: int) -> ModelSpec:
        """Of the model after so many steps."""
        return self.work.spec.at(step, self.work.num_steps)

    @property
    def state(self) -> str:
        """``finished``, ``training`` or ``stopped``."""
        last, steps = self.validation[-1:], self.config.train.steps
        if last and last[0]["step"] >= steps:
            return "finished"
        return "training" if self.pid is not None else "stopped"


def open_run(folder: Path, *, with_checkpoint: bool = True) -> Run:
    """Read a run's folder.

    Args:
        with_checkpoint: verify and describe the newest checkpoint too.
    Raises:
        ConfigError: there is no run, or its ``run.json`` cannot be used.
    Cost: every file of the newest checkpoint's weights once from the disk.
    """
    manifest = manifest_of(folder)
    config = config_of(folder, manifest)
    try:
        work = workload(config)
    except ConfigError as error:
        raise named(folder, error) from error
    rows, problems = metrics.rows_and_damage(folder / metrics.METRICS)
    saved, damage = _newest(folder) if with_checkpoint else (None, [])
    return Run(
        folder=folder,
        config=config,
        rows=rows,
        problems=[*problems, *damage],
        pid=held_by(folder),
        manifest=manifest,
        work=work,
        saved=saved,
    )


def _newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            saved = checkpoint.newest(folder, with_state=False)
        except ConfigError as error:
            return None, list(error.problems)
    return saved, [str(each.message) for each in caught]


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, no two the same: as few of its last parts as that takes."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(str(each) for each in folders if folders.count(each) > 1)
    raise ConfigError(f"{twice}: named twice; name every run once")


def gather(folders: Sequence[Path], *, samples: bool = True) -> Values:
    """What the runs in these folders tell.

    Args:
        samples: let each write a short text.
    Returns:
        ``runs``: a dict each (``of_run``); ``differences``: keys of the configurations whose values
        are not all the same, and the values by run.
    Raises:
        ConfigError: a folder holds no run, or is named twice.
    Cost: each newest checkpoint once from the disk, the singular values of its maps, and with
        ``samples`` some hundred tokens.
    """
    named = dict(zip(labels(folders), folders, strict=True))
    runs = {name: open_run(folder) for name, folder in named.items()}
    return {
        "runs": [of_run(name, run, samples) for name, run in runs.items()],
        "differences": differences({name: run.config for name, run in runs.items()}),
    }


def of_run(name: str, run: Run, samples: bool) -> Values:
    """Everything that the page shows of one run."""
    from crnet.report.weights import sample, tensors_of

    found: Values = {
        "name": name,
        "folder": str(run.folder),
        "summary": summary(run),
        "training": _columns(_with_axes(thinned(run.training, "loss"), run)),
        "num_training_rows": len(run.training),
        "validation": _columns(_with_axes(run.validation, run)),
        "ranks": ranks(run.work.spec),
        "history": history(run),
        "manifest": {key: run.manifest[key] for key in run.manifest if key != "earlier_starts"},
        "checkpoint": None,
        "gains": [],
        "spectra": [],
        "sample": None,
    }
    if run.saved is not None:
        try:
            found["checkpoint"] = {"step": run.saved.progress.step, "folder": str(run.saved.folder)}
            found |= tensors_of(run.saved, run.spec_at(run.saved.progress.step))
            found["sample"] = sample(run.saved) if samples else None
        except ConfigError as error:
            run.problems.extend(error.problems)
    return found | {"problems": run.problems}


def summary(run: Run) -> Values:
    """The row of a run in the table; a figure that nothing was written of is None."""
    training, last = run.training, (run.validation or [{}])[-1]
    tokens = training[-1]["tokens"] if training else 0
    seconds = sum(_intervals(training))
    peaks = [row["peak_bytes"] for row in training if "peak_bytes" in row]
    spec = run.spec_at(run.step)
    maps = [spec.map_tensors(slot).values() for block in spec.slots for slot in block]
    return {
        "state": run.state,
        "preset": run.config.preset,
        "method": run.config.model.linear,
        "step": run.step,
        "steps": run.config.train.steps,
        "parameters": sum(tensor.num_items for tensor in spec.tensors.values()),
        "block_parameters": sum(tensor.num_items for each in maps for tensor in each),
        "tokens": tokens,
        "train_loss": training[-1]["loss"] if training else None,
        **{key: last.get(key) for key in ("val_loss", "val_perplexity")},
        # Whatever else an evaluation wrote down: bits per byte, accuracy.
        **{key: last[key] for key in sorted(last) if key not in _OF_EVALUATION},
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds else None,
        "flops": total_flops(run, [run.step])[0],
        "peak_bytes": max(peaks, default=None),
        "predicted_bytes": step_memory(run.work),
        "precision": precision_of(run.config.train),
        "device": run.manifest.get("device"),
    }


_OF_EVALUATION = {"step", "val_loss", "val_perplexity", "val_tokens", "val_bytes", "val_precision"}


def total_flops(run: Run, steps: Sequence[int]) -> list[int]:
    """Of so many optimizer steps from the first on, all processes, recomputation with it."""
    work, end, turn = run.work, run.work.at_end() or run.work, run.work.num_steps_whole()
    before, after = (step_flops(each, each.plan)["total"] for each in (work, end))
    return [before * min(step, turn) + after * max(step - turn, 0) for step in steps]


def _intervals(training: Sequence[Row]) -> list[float]:
    """Seconds of training that each row covers, from its tokens and its rate; an evaluation and the
    writing of a checkpoint are in neither."""
    before = [0, *(row["tokens"] for row in training)]
    return [
        (row["tokens"] - start) / rate if (rate := row.get("tokens_per_s") or 0) > 0 else 0.0
        for row, start in zip(training, before, strict=False)
    ]


def _with_axes(rows: Sequence[Row], run: Run) -> list[Row]:
    """Rows with what they can be drawn against: tokens, FLOPs, seconds of training."""
    training = run.training
    flops = total_flops(run, [row["step"] for row in rows])
    steps, tokens, seconds = [0], [0.0], [0.0]
    for row, interval in zip(training, _intervals(training), strict=True):
        steps.append(row["step"])
        tokens.append(row["tokens"])
        seconds.append(seconds[-1] + interval)
    return [
        row
        | {
            "tokens": _between(row["step"], steps, tokens),
            "flops": spent,
            "seconds": _between(row["step"], steps, seconds),
        }
        for row, spent in zip(rows, flops, strict=True)
    ]


def _between(step: int, steps: Sequence[int], values: Sequence[float]) -> float:
    """The value at a step, on the line between those beside it; behind the last, that one's."""
    at = bisect.bisect_left(steps, step)
    if at == len(steps):
        return values[-1]
    if steps[at] == step:
        return values[at]
    share = (step - steps[at - 1]) / (steps[at] - steps[at - 1])
    return values[at - 1] + share * (values[at] - values[at - 1])


def thinned(rows: Sequence[Row], key: str, most: int = MOST_ROWS) -> list[Row]:
    """At most so many rows, the last one always: of every bunch the two where ``key`` is lowest and
    highest, so that no spike is lost; one that is not finite counts as the highest."""
    if len(rows) <= most:
        return list(rows)
    size = math.ceil(2 * len(rows) / (most - 1))

    def height(idx: int) -> float:
        return rows[idx][key] if math.isfinite(rows[idx][key]) else math.inf

    kept = {len(rows) - 1}
    for start in range(0, len(rows), size):
        bunch = range(start, min(start + size, len(rows)))
        kept |= {min(bunch, key=height), max(bunch, key=height)}
    return [rows[idx] for idx in sorted(kept)]


def _columns(rows: Sequence[Row]) -> Values:
    """Rows of figures as one list a key, None where a row has none."""
    keys = {key: None for row in rows for key, value in row.items() if _is_figure(value)}
    return {key: [_figure(row.get(key)) for row in rows] for key in keys}


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(value: Any) -> Any:
    """With as many digits as a picture shows."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def ranks(spec: ModelSpec) -> Values:
    """``positions`` and ``values``: a row a block; None: a dense map."""
    return {
        "positions": [position.name for position in spec.positions],
        "values": [[slot.rank or None for slot in block] for block in spec.slots],
    }


def differences(configs: Mapping[str, RunConfig]) -> Values:
    """Keys whose values differ between the runs; of a single run, from its preset.

    Returns:
        ``columns``: names; ``rows``: [key, a value a column].
    """
    columns = {name: dict(flags(config)) for name, config in configs.items()}
    if len(columns) == 1:
        (config,) = configs.values()
        columns = {f"preset {config.preset}": dict(leaves(_preset_of(config))), **columns}
    keys = {key: None for values in columns.values() for key in values}
    rows = [[key, *(values.get(key) for values in columns.values())] for key in keys]
    return {
        "columns": list(columns),
        "rows": [row for row in rows if any(each != row[1] for each in row[2:])],
    }


def _preset_of(config: RunConfig) -> Values:
    try:
        return to_dict(presets.get(config.preset))
    except ConfigError:  # of a plugin, or of another version
        return to_dict(config)


def history(run: Run) -> list[Values]:
    """What happened, in its order: starts, figures that were not finite, what the guard of invert
    keeps, and how it stands. A dict each: ``kind``, ``step``, ``time`` (or None), ``text``."""
    found = []
    starts = [*run.manifest.get("earlier_starts", []), run.manifest]
    for start in starts:
        step = start.get("from_step") or 0
        text = "began" if not found else f"went on from step {step:,}"
        if changed := start.get("resumed_with"):
            text += "; " + "; ".join(map(str, changed))
        found.append(_event("start", step, text, start.get("time")))
    for row in run.rows:
        broken = [key for key in _MUST_BE_FINITE if not math.isfinite(row.get(key, 0))]
        if broken:
            found.append(_event("failure", row["step"], f"not finite: {', '.join(broken)}"))
        if "invert_also_keeps" in row:
            found.append(_event("guard", row["step"], _guard(row["invert_also_keeps"])))
    ends = {
        "finished": "finished",
        "training": f"is training, process {run.pid}",
        "stopped": f"stopped before its {run.config.train.steps:,} steps were done",
    }
    kind = "failure" if run.state == "stopped" else "end"
    return [*found, _event(kind, run.step, ends[run.state])]


_MUST_BE_FINITE = ("loss", "grad_norm", "val_loss")


def _event(kind: str, step: int, text: str, time: str | None = None) -> Values:
    return {"kind": kind, "step": step, "time": time, "text": text}


def _guard(kept: Any) -> str:
    if not isinstance(kept, Mapping) or not kept:
        return "invert keeps no more outputs"
    layers = "; ".join(f"{position} of {list(each)}" for position, each in kept.items())
    return f"invert also keeps the outputs {layers}"
