"""What a study came to: results.json, a table in Markdown, and what was called better.

Losses are those of the validation set after the last step. Every run is there, also those that
failed or diverged, with its folder and what it was run with.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crnet.compare.comparison import Comparison
from crnet.compare.rates import embedding_rates, warning
from crnet.compare.study import Compat, Row, last_step
from crnet.compare.sweep import Trial, steps_at
from crnet.compare.verdicts import detectable, judge
from crnet.config.serialize import flags, read_json
from crnet.cost.peak import peak_bytes
from crnet.cost.step import step_flops
from crnet.cost.workload import Workload, workload
from crnet.errors import ConfigError
from crnet.inference.on_rows import evaluate_on_compat
from crnet.markdown import markdown_table
from crnet.report.folder import MANIFEST
from crnet.storage import metrics
from crnet.storage.checkpoint import newest
from crnet.storage.files import write_json
from crnet.storage.manifest import describe_code

Values = dict[str, Any]

COMPAT = "compat.json"
"""In a run's folder: its figures as GaLore's script would print them."""
PROVENANCE = ("crnet", "commit", "dirty", "python", "torch", "device", "threads")
"""Of a run's manifest: what its figures hang on."""


def results(of: Comparison) -> Values:
    """Everything that is known so far."""
    study = of.study
    rows = {name: _row(of, row) for name, row in study.rows.items()}
    target = rows[study.reference]["val_loss"]
    for name, row in study.rows.items():
        rows[name]["to_reach"] = _to_reach(row, rows[name], target)
    verdicts = []
    if study.rule:
        losses = {
            name: [_loss(run) for run in each["runs"]] or [None] for name, each in rows.items()
        }
        verdicts = [dataclasses.asdict(each) for each in judge(losses, study.pairs(), study.rule)]
    return {
        "name": study.name,
        "title": study.title,
        "date": time.strftime("%Y-%m-%d"),
        "code": describe_code(),
        "seeds": study.seeds,
        "reference": study.reference,
        "rule": dataclasses.asdict(study.rule) if study.rule else None,
        "detectable": detectable(study),
        "tuning": dataclasses.asdict(study.tuning) if study.tuning else None,
        "compat": dataclasses.asdict(study.compat) if study.compat else None,
        "grown": of.grown,
        "rows": rows,
        "verdicts": verdicts,
        "mixed": mixed(rows),
    }


def _row(of: Comparison, row: Row) -> Values:
    tuned = of.study.tuning is not None
    best = of.best(row) if tuned else ()
    trials = [] if best is None else [of.trial(row, best, seed) for seed in of.study.seeds]
    work = workload(trials[0].config if trials else row.config)
    runs = [_run(of, row, trial) for trial in trials]
    found = {
        "settings": _settings(of, row),
        "best": dict(best or ()),
        **cost(work),
        "alignment": dataclasses.asdict(row.alignment) if row.alignment else None,
        "published": row.published,
        "note": row.note,
        "tuning": _tuning(of, row) if tuned else None,
        "runs": runs,
    }
    keys = ("val_loss", "val_bits_per_byte", "val_perplexity", "tokens_per_s", "compat_perplexity")
    whole = runs and all(run["problem"] is None and run["step"] is not None for run in runs)
    for key in keys:
        values = [run[key] for run in runs] if whole else []
        known = values if values and None not in values else []
        found[key] = statistics.mean(known) if known else None
        found[f"{key}_sd"] = statistics.stdev(known) if len(known) > 1 else None
    found["tokens"] = runs[0]["tokens"] if whole else None
    return found


def cost(work: Workload) -> Values:
    """By the cost model: what a row takes. FLOPs: forward, backward and recomputation. And how fast
    its embedding learns beside its maps."""
    state = work.state_bytes
    return {
        "parameters": work.num_parameters(),
        "weight_bytes": state["weights"],
        "gradient_bytes": state["gradients"],
        "optimizer_bytes": state["optimizer state"],
        "activation_bytes": peak_bytes(work.micro_batch, work.plan),
        "flops_a_token": step_flops(work, work.plan)["total"] / step_tokens(work),
        "embedding_rates": embedding_rates(work),
    }


def step_tokens(work: Workload) -> int:
    """Of an optimizer step."""
    return work.num_micro_batches * work.micro_batch.sequences * work.micro_batch.length


def _settings(of: Comparison, row: Row) -> Values:
    """Keys in which a row is not as the others are."""
    every = [dict(flags(each.config)) for each in of.study.rows.values()]
    ours = dict(flags(row.config))
    return {key: ours[key] for key in ours if any(each[key] != ours[key] for each in every)}


def _tuning(of: Comparison, row: Row) -> Values:
    assert of.study.tuning
    best, front = of.best(row), of.front(row) if of.study.tuning.finalists > 1 else []
    points = []
    for point in of.points(row):
        trials = of.trials(row, point)
        figures = [of.figures(row, trial, of.study.tuning.share) for trial in trials]
        losses = [(each or {}).get("val_loss") for each in figures]
        known = [loss for loss in losses if loss is not None]
        points.append(
            {
                "values": dict(point),
                "losses": losses,
                "val_loss": statistics.mean(known) if len(known) == len(losses) else None,
                "at_the_end": of.losses(row, point, None) if point in front else [],
                "problems": [each["problem"] for each in figures if each and "problem" in each],
                "runs": [
                    str(of.folder(row, trial).relative_to(of.out))
                    for trial, each in zip(trials, figures, strict=True)
                    if each is not None
                ],
            }
        )
    step = steps_at(row.config, of.study.tuning.share)
    edges = [f"{key}, {('least', 'largest')[side]}" for key, side in of.edges(row, best)]
    others = [each["at_the_end"] for each in points if each["values"] != dict(best or ())]
    went_on = sum(loss is not None for losses in others for loss in losses)
    steps = step * sum(len(each["runs"]) for each in points)
    steps += went_on * (last_step(row.config) - step)
    tokens = steps * step_tokens(workload(row.config))
    return {"step": step, "points": points, "edges": edges, "tokens": tokens}


def _run(of: Comparison, row: Row, trial: Trial) -> Values:
    """One seed of a row's best point."""
    folder = of.folder(row, trial)
    figures = of.figures(row, trial, None)
    found: Values = {
        "seed": trial.config.train.seed,
        "folder": str(folder.relative_to(of.out)),
        "step": None,
        "tokens": None,
        "val_loss": None,
        "val_bits_per_byte": None,
        "val_perplexity": None,
        "tokens_per_s": None,
        "compat_perplexity": None,
        "problem": None,
        "curve": [],
    }
    rows = metrics.read(folder / metrics.METRICS) if (folder / metrics.METRICS).exists() else []
    batch = trial.config.train.batch_size * trial.config.data.sequence_length
    found["curve"] = [
        (each["step"] * batch, each["val_loss"]) for each in rows if "val_loss" in each
    ]
    rates = [each["tokens_per_s"] for each in rows if each.get("tokens_per_s")]
    found["tokens_per_s"] = statistics.median(rates) if rates else None
    if figures is not None:
        found |= {"step": last_step(trial.config), **figures}
        if of.study.compat and "problem" not in figures:
            found["compat_perplexity"] = _compat(of.study.compat, folder)
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST)
        found |= {key: manifest.get(key) for key in PROVENANCE}
    return found


def _compat(compat: Compat, folder: Path) -> float:
    """What GaLore's script would print of a run's last checkpoint; computed once."""
    file, asked = folder / COMPAT, dataclasses.asdict(compat)
    if file.exists() and (known := read_json(file)).get("asked") == asked:
        return known["compat_perplexity"]
    saved = newest(folder)
    if saved is None:
        raise ConfigError(f"{folder}: its last checkpoint is gone; leave [compat] out")
    found = evaluate_on_compat(saved, saved.config.data, "auto", **asked)
    write_json(file, {"asked": asked, **found})
    return found["compat_perplexity"]


def _loss(run: Mapping[str, Any]) -> float | None:
    return run["val_loss"] if run["problem"] is None else None


def _to_reach(row: Row, found: Mapping[str, Any], target: float | None) -> Values | None:
    """Tokens and FLOPs until the reference's final loss, on the line between two evaluations
    (table 11); the mean over the seeds that reach it."""
    if target is None:
        return None
    tokens = [crossing(run["curve"], target) for run in found["runs"] if _loss(run) is not None]
    reached = [each for each in tokens if each is not None]
    mean = statistics.mean(reached) if reached else None
    return {
        "val_loss": target,
        "seeds": len(reached),
        "tokens": mean,
        "flops": None if mean is None else mean * found["flops_a_token"],
    }


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve of (tokens, loss) first is at a loss or below it; None: it is not."""
    before: tuple[float, float] | None = None
    for tokens, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return tokens
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = tokens, loss
    return None


def mixed(rows: Mapping[str, Values]) -> list[str]:
    """What differs among the runs that should not: code, versions, processor."""
    runs = [run for row in rows.values() for run in row["runs"] if "crnet" in run]
    found = []
    for key in PROVENANCE:
        values = sorted({str(run.get(key)) for run in runs})
        if len(values) > 1 and key != "dirty":
            found.append(f"{key}: {', '.join(values)}")
    if any(run.get("dirty") for run in runs):
        found.append("some runs come from a working tree with changes that no commit has")
    return found


# Words


def table(found: Mapping[str, Any]) -> str:
    """The rows as Markdown: what compares first."""
    printed = any(row["published"] for row in found["rows"].values())
    compat = found["compat"] is not None
    heads = [
        *("", "bits per byte", "perplexity", "loss", "parameters", "optimizer state, MiB"),
        *("activations, MiB", "MFLOPs a token", "tokens/s", "tokens to reach", "FLOPs to reach"),
        *(["as GaLore's script"] if compat else []),
        *(["printed", "why not the same"] if printed else []),
    ]
    lines = []
    for name, row in found["rows"].items():
        reach = row["to_reach"] or {}
        cells = [
            _label(name, row),
            _spread(row, "val_bits_per_byte", 4),
            _spread(row, "val_perplexity", 2),
            _spread(row, "val_loss", 4),
            f"{row['parameters']:,}",
            f"{row['optimizer_bytes'] / 2**20:,.1f}",
            f"{row['activation_bytes'] / 2**20:,.1f}",
            f"{row['flops_a_token'] / 1e6:,.1f}",
            "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
            "-" if reach.get("tokens") is None else f"{reach['tokens']:,.0f}",
            "-" if reach.get("flops") is None else f"{reach['flops']:.3g}",
            *([_spread(row, "compat_perplexity", 2)] if compat else []),
            *([_number(row["published"]), row["note"] or "-"] if printed else []),
        ]
        lines.append(cells)
    return markdown_table(heads, lines)


def _label(name: str, row: Mapping[str, Any]) -> str:
    best = in_words(row["best"])
    return name + (f" ({best})" if best else "")


def _spread(row: Mapping[str, Any], key: str, digits: int) -> str:
    if row[key] is None:
        ended = sum(run["step"] is not None and run["problem"] is None for run in row["runs"])
        return f"{ended} of {len(row['runs'])} runs" if row["runs"] else "-"
    deviation = row[f"{key}_sd"]
    around = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{row[key]:.{digits}f}{around}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def markdown(found: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [f"# {found['title']}", _about(found), table(found)]
    if unlike := warning(found["rows"], found["tuning"]):
        parts += [f"{unlike[0].upper()}{unlike[1:]}."]
    if found["verdicts"]:
        parts += ["## What is called better", _rule_words(found), verdicts(found)]
    if found["tuning"]:
        parts += ["## How each row was tuned", _tuning_words(found), tuning_table(found)]
    if failed := failures(found):
        parts += ["## What failed or diverged", "\n".join(f"- {line}" for line in failed)]
    parts += ["## Every run", runs_table(found)]
    if found["mixed"]:
        parts += ["Not all runs are alike: " + "; ".join(found["mixed"]) + "."]
    return "\n\n".join(parts) + "\n"


def _about(found: Mapping[str, Any]) -> str:
    tokens = sorted({row["tokens"] for row in found["rows"].values() if row["tokens"]})
    words = " and ".join(f"{each:,}" for each in tokens) or "no"
    return (
        f"Study `{found['name']}`, {found['date']}: {words} tokens a run, seeds "
        f"{', '.join(map(str, found['seeds']))}. Mean ± standard deviation over the seeds. "
        f"Tokens and FLOPs to reach: until the final loss of {found['reference']}."
    )


def _rule_words(found: Mapping[str, Any]) -> str:
    rule = found["rule"]
    return (
        f"Welch's t-test on the final losses, level {rule['level']:g} for all pairs together "
        f"(Holm), and {rule['least_nats']:g} nats at least; fixed in the study's file. With "
        f"{len(found['seeds'])} seeds and {len(found['verdicts'])} pairs about "
        f"{found['detectable']:.1f} deviations of a seed's loss must lie between two rows."
    )


def verdicts(found: Mapping[str, Any]) -> str:
    """One line a pair."""
    heads = ("", "beside", "difference, nats", "p", "p, corrected", "called")
    lines = []
    for each in found["verdicts"]:
        difference = "-" if each["difference"] is None else f"{each['difference']:+.4f}"
        p, corrected = (
            "-" if each[key] is None else f"{each[key]:.2g}" for key in ("p", "p_corrected")
        )
        called = each["called"] if each["called"] != "not judged" else f"not judged: {each['why']}"
        lines.append((each["row"], each["other"], difference, p, corrected, called))
    return markdown_table(heads, lines)


def _tuning_words(found: Mapping[str, Any]) -> str:
    tuning = found["tuning"]
    grown = ", ".join(
        f"{key} by {below} below and {above} above"
        for key, (below, above) in found["grown"].items()
    )
    finalists = tuning["finalists"]
    went_on = "" if finalists == 1 else f"at the end in brackets for the best {finalists}, "
    return (
        f"Every point of the grid for {100 * tuning['share']:g}% of the steps, inside the whole "
        f"schedule, {tuning['seeds']} seed{'s' * (tuning['seeds'] > 1)}. Validation loss there, "
        f"{went_on}the best in bold. The grid {'grew: ' + grown if grown else 'did not grow'}."
    )


def tuning_table(found: Mapping[str, Any]) -> str:
    """A column each value of the key that has the most of them (rates, as a rule), a line each row
    and values of the others."""
    points = [point for row in found["rows"].values() for point in row["tuning"]["points"]]
    tried: dict[str, list[Any]] = {}
    for point in points:
        for key, value in point["values"].items():
            if value not in tried.setdefault(key, []):
                tried[key].append(value)
    across = max(tried, key=lambda key: len(tried[key]))
    columns = sorted(tried[across], key=lambda value: (not isinstance(value, int | float), value))
    rates = [f"{across.rpartition('.')[2]} {value}" for value in columns]
    lines = []
    for name, row in found["rows"].items():
        groups: dict[str, dict[Any, str]] = {}
        for point in row["tuning"]["points"]:
            others = {key: value for key, value in point["values"].items() if key != across}
            cells = groups.setdefault(in_words(others), {})
            cells[point["values"][across]] = _tuned(point, point["values"] == row["best"])
        edge = "; ".join(row["tuning"]["edges"]) or "-"
        first = name, f"{row['tuning']['tokens']:,}", edge
        for others, cells in sorted(groups.items()):
            name, *last = first
            lines.append([name, others, *(cells.get(value, "") for value in columns), *last])
            first = "", "", ""
    return markdown_table(["", "", *rates, "tokens", "edge"], lines)


def _tuned(point: Mapping[str, Any], is_best: bool) -> str:
    if point["problems"]:
        return "failed"
    loss = "-" if point["val_loss"] is None else f"{point['val_loss']:.4f}"
    at_the_end = point.get("at_the_end")
    if at_the_end and None not in at_the_end:
        loss += f" ({statistics.mean(at_the_end):.4f})"
    return f"**{loss}**" if is_best else loss


def in_words(values: Mapping[str, Any]) -> str:
    """A point of a grid, keys without their sections."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())


def failures(found: Mapping[str, Any]) -> list[str]:
    """Every run that failed or diverged, and why."""
    lines = []
    for name, row in found["rows"].items():
        for each in (row["tuning"] or {}).get("points", ()):
            for problem in each["problems"]:
                lines.append(f"{name}, {in_words(each['values'])}: {problem}")
        for run in row["runs"]:
            if run["problem"]:
                lines.append(f"{name}, seed {run['seed']}: {run['problem']}")
    return lines


def runs_table(found: Mapping[str, Any]) -> str:
    """Every final run, with what it was run with."""
    heads = ("run", "loss", "bits per byte", "tokens/s", "commit", "torch", "processor")
    lines = []
    for row in found["rows"].values():
        for run in row["runs"]:
            loss, bits, rate = run["val_loss"], run["val_bits_per_byte"], run["tokens_per_s"]
            commit = str(run.get("commit") or "-")[:9] + (
                " and changes" if run.get("dirty") else ""
            )
            cells = (
                run["folder"],
                "-" if loss is None else f"{loss:.4f}",
                "-" if bits is None or math.isnan(bits) else f"{bits:.4f}",
                "-" if rate is None else f"{rate:,.0f}",
                commit,
                str(run.get("torch", "-")),
                str(run.get("device", "-")),
            )
            lines.append(cells)
    return markdown_table(heads, lines)
