"""What recomputation.py's parts share; the paper's table 2; tables and picture from JSON files.

    python benchmarks/recomputation_report.py paper --out benchmarks/DATE-recomputation-paper.json
    python benchmarks/recomputation_report.py figure [FILE ...] --out docs/recomputation.png
    python benchmarks/recomputation_report.py table [FILE ...] [--write docs/recomputation.md]
    python benchmarks/recomputation_report.py --quick --out FOLDER    # all three, into a folder

``paper`` recomputes table 2 from closed forms; it runs no model. ``figure`` and ``table`` read the
files given, or all ``*-recomputation-*.json`` beside this program.

JSON paper: benchmark, date, command, options, threads, device, code, model, tokens, convention,
table_2, printed_flops_e15, sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from crnet.config import presets
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import ModelConfig, choose
from crnet.cost.flops import block_flops
from crnet.cost.kept import kept_bytes
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.parameters import num_parameters
from crnet.cost.peak import peak_bytes
from crnet.cost.plan_choice import least_peak
from crnet.markdown import markdown_table
from crnet.recompute.plan import RecomputePlan, parse_layers
from crnet.storage import manifest

UNGUARDED = 1e30
"""A tolerance that no error of ``invert`` passes: the paper's algorithm as published."""

Json = dict[str, Any]


def write(name: str, given: Any, device: torch.device, found: Json) -> None:
    """Print a report, and write it to ``--out``."""
    # Paths of the machine it ran on say nothing to others.
    options = {
        key: value
        for key, value in vars(given).items()
        if key not in ("part", "out", "runs", "source", "quick")
    }
    report = {
        "benchmark": f"recomputation {name}",
        "date": time.strftime("%Y-%m-%d"),
        "command": [Path(word).name if "/" in word else word for word in sys.argv],
        "options": options,
        "threads": torch.get_num_threads(),
        "device": manifest.describe_device(device),
        "code": manifest.describe_code(),
        **found,
    }
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def plans(micro_batch: MicroBatch) -> dict[str, RecomputePlan]:
    """The policies that are compared."""
    num_layers = micro_batch.spec.num_layers
    published, thirds = parse_layers("every-8", num_layers), (num_layers // 3, 2 * num_layers // 3)
    kept, kept_beside = least_peak(micro_batch), least_peak(micro_batch, True)
    return {
        "none": RecomputePlan(),
        "block": RecomputePlan("block"),
        "invert": RecomputePlan("invert", published, tolerance=UNGUARDED),
        "replay": RecomputePlan("replay", kept),
        "replay, attention kept": RecomputePlan("replay", kept_beside, True),
        "replay, equal thirds": RecomputePlan("replay", thirds),
    }


def describe(spec: ModelSpec) -> Json:
    """Sizes, and the rank of every block."""
    keys = ("linear", "hidden_size", "intermediate_size", "num_heads", "num_layers", "vocab_size")
    ranks = [block[0].rank for block in spec.slots]
    return {key: getattr(spec.config, key) for key in keys} | {"ranks": ranks}


def full_rank(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(choose(model, "linear", "full"), rank="1")


def eq_38_items(micro_batch: MicroBatch, plan: RecomputePlan) -> int:
    """Eq. 38 as printed, for the whole micro-batch; 7 (L-1) s r as a sum, as ranks may differ."""
    spec, shape = micro_batch.spec, micro_batch.spec.shape
    num_kept = len({*plan.kept_layers, spec.num_layers})
    h, f = shape.hidden_size, shape.intermediate_size
    bottlenecks = sum(slot.rank for block in spec.slots[1:] for slot in block)
    return micro_batch.rows * (
        (spec.num_layers + 5 * num_kept) * h + 2 * num_kept * f + bottlenecks
    )


# --- the paper's table 2 --------------------------------------------------------------------------

PRINTED = {  # table 2 at 16 x 256 tokens: GB, and FLOPs over what it calls 10^15
    "vanilla GCP": (51.22, 2.119),
    "full rank": (70.97, 1.608),
    "CoLA-M": (24.78, 0.752),
    "CR-Net": (23.35, 0.692),
}


def paper(given: Any) -> None:
    """Table 2 recomputed under the convention that gives its figures, and our terms beside it."""
    model = dataclasses.replace(presets.get("llama-7b").model, vocab_size=32_000)
    micro_batch = MicroBatch(model_spec(model), 16, 256, "bf16")
    full = dataclasses.replace(micro_batch, spec=model_spec(full_rank(model)))
    sides = {"full rank, none": (full, RecomputePlan())}
    sides |= {name: (micro_batch, plan) for name, plan in plans(micro_batch).items()}
    found = {
        "model": describe(micro_batch.spec),
        "tokens": micro_batch.rows,
        "convention": "GB = 2^30 bytes; 8 bytes a parameter (weight, gradient, two Adam states in "
        "bf16; vocabulary 32,000, embedding and head apart) and 2 bytes an item of activations",
        "table_2": [_table_2_row(*row) for row in _table_2(micro_batch)],
        "printed_flops_e15": {name: flops for name, (_, flops) in PRINTED.items()},
        "sides": {
            name: {
                "plan": dataclasses.asdict(plan),
                "terms": kept_bytes(of, plan),
                "peak": peak_bytes(of, plan),
                "flops": block_flops(of, plan),
            }
            for name, (of, plan) in sides.items()
        },
    }
    write("paper", given, torch.device("cpu"), found)


def _table_2(micro_batch: MicroBatch) -> list[tuple[str, str, ModelConfig, float]]:
    """Of each reading of a row: method, formula, model, items of activations."""
    model, rows = micro_batch.spec.config, micro_batch.rows
    full = full_rank(model)
    layers, h, f = model.num_layers, model.hidden_size, model.intermediate_size
    stream, scores = layers * rows * h, 2 * layers * rows * micro_batch.length * model.num_heads
    found: list[tuple[str, str, ModelConfig, float]] = [
        ("vanilla GCP", "L s h", full, stream),
        ("full rank", "20.67 L s h + 2 L s² a", full, 20.67 * stream + scores),
        ("full rank", "(10 + 4 f/h) L s h", full, (10 + 4 * f / h) * stream),
    ]
    for rank in (512, 1024):
        low = dataclasses.replace(choose(model, "linear", "lowrank"), rank=str(rank))
        items = 2 * stream + 7 * layers * rows * rank
        found.append(("CoLA-M", f"2 L s h + 7 L s r, r = {rank}", low, items))
    b = 4  # members of A
    items = ((layers + 10 * b) * h + 7 * (layers - 1) * 896) * rows
    found.append(("CR-Net", "(L + 10 b) s h + 7 (L-1) s r, r = 896", model, items))
    for rank in (512, 896):
        ranked = dataclasses.replace(model, rank=str(rank))
        of = dataclasses.replace(micro_batch, spec=model_spec(ranked))
        items = eq_38_items(of, plans(micro_batch)["invert"])
        found.append(("CR-Net", f"eq. 38, r = {rank}", ranked, items))
    return found


def _table_2_row(name: str, formula: str, model: ModelConfig, items: float) -> Json:
    gib = 2**30
    states = 8 * num_parameters(model_spec(model))["total"] / gib
    return {
        "name": name,
        "formula": formula,
        "printed_gb": PRINTED[name][0],
        "states_gib": states,
        "activations_gib": 2 * items / gib,
        "sum_gib": states + 2 * items / gib,
    }


# --- reading --------------------------------------------------------------------------------------


def read(files: Sequence[Path]) -> dict[str, list[Json]]:
    """Reports by part; of one part, shape and initial beta the last file counts."""
    files = files or sorted(Path(__file__).parent.glob("*-recomputation-*.json"))
    apart = {
        "time": ("preset", "micro_batch", "length", "layers", "precision"),
        "train": ("beta_init",),
    }
    reports: dict[str, dict[str, Json]] = {}
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        part = report["benchmark"].removeprefix("recomputation ")
        key = json.dumps([report["options"].get(it) for it in apart.get(part, ())])
        reports.setdefault(part, {})[key] = report
    return {part: list(found.values()) for part, found in reports.items()}


def _grid(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    return markdown_table([*map(str, head)], [[*map(str, row)] for row in rows])


def _origin(report: Json) -> str:
    commit = (report["code"]["commit"] or "unknown")[:8]
    dirty = ", changed" if report["code"]["dirty"] else ""
    threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}"
    return f"{report['date']}, commit {commit}{dirty}, {report['device']}, {threads}"


def _layers(plan: Json) -> str:
    return ", ".join(map(str, plan["kept_layers"])) or ""


def _few(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


# --- tables ---------------------------------------------------------------------------------------


def table(given: Any) -> None:
    """Print the tables, or put them between a document's markers."""
    reports = read(given.files)
    tables: dict[str, str] = {}
    for part, (names, make) in MAKERS.items():
        if part in reports:
            tables |= dict(zip(names, make(reports[part]), strict=True))
    if given.write is None:
        shown = (f"<!-- table: {name} -->\n{text}\n<!-- end -->\n" for name, text in tables.items())
        text = "\n".join(shown)
        if given.out:
            given.out.write_text(text, encoding="utf-8")
        print(text)
        return
    text = given.write.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- table: (\S+) -->", text):
        if name not in tables:
            print(f"no report for table {name}: left as it is", file=sys.stderr)
            continue
        marked = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(
            marked, lambda it, name=name: f"{it[1]}\n{tables[name]}\n\n{it[2]}", text, flags=re.S
        )
    given.write.write_text(text, encoding="utf-8")


_TERMS = ("stream", "outputs", "bottlenecks", "inside")


def _by_term(side: Json, terms: Json, unit: int, form: str) -> list[str]:
    rest = sum(terms.values()) - sum(terms[name] for name in _TERMS)
    sizes = [*(terms[name] for name in _TERMS), rest, sum(terms.values())]
    return [_layers(side["plan"]), *(format(size / unit, form) for size in sizes)]


def _memory_tables(reports: list[Json]) -> list[str]:
    report = reports[-1]
    mib = 2**20
    rows = [
        [
            name,
            *_by_term(side, side["kept"]["terms"], mib, ",.1f"),
            f"{side['kept']['difference']:,}",
            f"{side['peak']['measured'] / mib:,.1f}",
            f"{side['peak']['closed_form'] / side['peak']['measured'] - 1:+.2%}",
        ]
        for name, side in report["sides"].items()
    ]
    head = ["policy", "layers kept", *_TERMS, "rest", "**kept**", "measured - closed form, bytes"]
    options, eq_38 = report["options"], report["eq_38"]
    return [
        f"MiB; {options['preset']}, {options['micro_batch']} x {options['length']} tokens, "
        f"{options['precision']} ({_origin(report)}):\n\n"
        + _grid([*head, "peak, traced", "closed form of the peak"], rows)
        + f"\n\nEq. 38 as printed gives {eq_38['bytes']:,} bytes at this shape; `invert`'s stream, "
        f"outputs and bottlenecks are {eq_38['invert_stream_outputs_bottlenecks']:,}."
    ]


def _paper_tables(reports: list[Json]) -> list[str]:
    report, gib = reports[-1], 2**30
    rows = [
        [it["name"], it["formula"], it["printed_gb"]]
        + [f"{it[key]:.2f}" for key in ("states_gib", "activations_gib", "sum_gib")]
        for it in report["table_2"]
    ]
    printed = ["method", "activations", "printed", "8 bytes a parameter", "2 bytes an item", "sum"]
    sides = [
        [
            name,
            *_by_term(side, side["terms"], gib, ".2f"),
            f"{side['peak'] / gib:.2f}",
            f"{sum(side['flops'].values()) / 1e14:.3f}",
        ]
        for name, side in report["sides"].items()
    ]
    head = ["policy", "layers kept", *_TERMS, "rest", "**kept**", "peak", "10^14 FLOPs"]
    return [_grid(printed, rows), _grid(head, sides)]


def _time_tables(reports: list[Json]) -> list[str]:
    rows = []
    for report in sorted(reports, key=lambda it: (it["options"]["length"], it["tokens"])):
        options, sides = report["options"], report["sides"]
        layers = f", {options['layers']} layers" if options["layers"] else ""
        name = f"{options['preset']}{layers}, {options['micro_batch']} x {options['length']}"
        if options["precision"] != "fp32":
            name += f", {options['precision']}"
        for policy, side in sides.items():
            least, most = side["time_ratio_least_and_most"]
            rows.append(
                [
                    name,
                    policy,
                    f"{side['median_s']:.3f}",
                    f"{side['time_ratio_median_of_rounds']:.3f} ({least:.3f} to {most:.3f})",
                    f"{side['flop_ratio']:.3f}",
                    f"{side['kept_bytes'] / 2**20:,.0f}",
                    f"{side['peak_bytes'] / 2**20:,.0f}",
                ]
            )
            name = ""
    head = ["shape", "policy", "median s", "time ratio to none", "FLOP ratio"]
    rounds = sorted({report["options"]["rounds"] for report in reports})
    return [
        f"{'/'.join(map(str, rounds))} rounds; in brackets the least and the greatest round; kept "
        f"and peak by the closed forms ({_origin(reports[-1])}):\n\n"
        + _grid([*head, "kept MiB", "peak MiB"], rows)
    ]


def _error_tables(reports: list[Json]) -> list[str]:
    report = reports[-1]
    depths = sorted({row["layers"] for row in report["rows"]})
    cells: dict[tuple[str, float], list[str]] = {}
    for row in report["rows"]:
        cell = f"{_few(row['invert_largest'])} ({_few(row['bound'])})"
        cells.setdefault((row["arithmetic"], row["gain"]), []).append(cell)
    rows = [[arithmetic, gain, *found] for (arithmetic, gain), found in sorted(cells.items())]
    exact = all(row["replay_bit_equal"] for row in report["rows"])
    within = all(row["within_bound"] for row in report["rows"])
    replay = "0, bit for bit, in all" if exact else "NOT exact in some"
    return [
        _grid(["arithmetic", "gain", *(f"{depth} layers" for depth in depths)], rows)
        + f"\n\n`replay`: {replay} of these {len(report['rows'])} cases, all seeds. Every error "
        f"{'lies' if within else 'does NOT lie'} within its bound ({_origin(report)})."
    ]


def _train_tables(reports: list[Json]) -> list[str]:
    makers = (_runs_table, _gradients_table, _rebuilt_table)
    return ["\n\n".join(make(report) for report in reports) for make in makers]


def _beta(report: Json) -> str:
    return f"Initial beta {report['options']['beta_init']:g}"


def _runs_table(report: Json) -> str:
    model, options = report["model"], report["options"]
    low, middle, high = report["trained"]["gain_least_median_most"]
    head = ["run", "validation loss", "losses are those of none", "largest difference"]
    head += ["mean difference, last tenth", "of validation", "outputs the guard adds"]
    rows = [_run_row(name, run) for name, run in report["runs"].items()]
    return (
        f"{_beta(report)}: {options['steps']} steps of {options['batch']} x {options['length']} "
        f"tokens of {', '.join(report['corpus'])}, "
        f"{model['num_layers']} layers, h {model['hidden_size']}, f {model['intermediate_size']}, "
        f"rank {model['ranks'][-1]}, vocabulary {model['vocab_size']:,}; bf16 is "
        f"`{report['bf16']}`; gains after training in fp32 {low:.2f} to {high:.2f}, median "
        f"{middle:.2f} ({_origin(report)}):\n\n" + _grid(head, rows)
    )


def _run_row(name: str, run: Json) -> list[Any]:
    cells = [""] * 4
    if against := run.get("against"):
        first = against["first_step_that_differs"]
        cells = [
            "bit for bit" if against["bit_equal"] else f"up to step {first - 1}",
            _few(against["largest"]),
            _few(against["mean_of_last_tenth"]),
            "" if against["validation"] is None else _few(against["validation"]),
        ]
    last = run["guard"][-1]["invert_also_keeps"] if run["guard"] else {}
    kept = sum(map(len, last.values())) if run["plan"]["policy"] == "invert" else ""
    return [name, run["failed"] or f"{run['validation'][-1]:.4f}", *cells, kept]


def _gradients_table(report: Json) -> str:
    gradients = report["trained"]["gradients"]
    errors = ("whole", "worst_tensor", "worst_beta")
    rows = []
    for policy in next(iter(gradients.values())):
        found = [by_policy[policy] for by_policy in gradients.values()]
        cells = [
            "0" if one["bit_equal"] else " / ".join(_few(one[error]) for error in errors)
            for one in found
        ]
        rows.append([policy, *cells])
    return f"{_beta(report)}:\n\n" + _grid(["policy", *gradients], rows)


def _rebuilt_table(report: Json) -> str:
    rebuilt = report["trained"]["rebuilt_outputs"]
    depths = [it["layers"] for it in rebuilt["fp32"] if it["layers"] in (1, 3, 7, 15, 31, 63)]
    rows = []
    for name, errors in rebuilt.items():
        found = [errors[depth - 1] for depth in depths]
        rows.append([name, *(f"{_few(it['largest'])} ({_few(it['bound'])})" for it in found)])
    crossed = ["arithmetic", *(f"{depth} crossed" for depth in depths)]
    return f"{_beta(report)}:\n\n" + _grid(crossed, rows)


MAKERS: dict[str, tuple[list[str], Any]] = {
    "memory": (["memory"], _memory_tables),
    "paper": (["table-2", "7b"], _paper_tables),
    "time": (["time"], _time_tables),
    "error": (["error"], _error_tables),
    "train": (["train", "gradients", "rebuilt"], _train_tables),
}


# --- figure ---------------------------------------------------------------------------------------


def figure(given: Any) -> None:
    """Errors against layers crossed; bytes by policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    reports = read(given.files)
    drawn, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    _draw_errors(left, reports["error"][-1], reports.get("train", []))
    _draw_bytes(right, reports["memory"][-1])
    drawn.savefig(given.out or Path("recomputation.png"), dpi=120)
    pyplot.close(drawn)


def _draw_errors(axes: Any, report: Json, trainings: list[Json]) -> None:
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    gains = sorted({row["gain"] for row in report["rows"]})
    floor, ceiling = 1e-8, 1e2
    for at, gain in enumerate(gains):
        for arithmetic, style in (("bf16", "o-"), ("fp32", "s--")):
            points = [
                (row["layers"], row["invert_largest"])
                for row in report["rows"]
                if (row["gain"], row["arithmetic"]) == (gain, arithmetic)
            ]
            label = f"gain {gain:g}" if arithmetic == "bf16" else None
            color = colors(0.9 * at / max(1, len(gains) - 1))
            axes.plot(*zip(*points, strict=True), style, color=color, ms=4, label=label)
    for training, style in zip(trainings, (":", "-.", (0, (1, 4))), strict=False):
        for arithmetic in ("bf16", "fp32"):
            found = training["trained"]["rebuilt_outputs"][arithmetic]
            label = f"trained, beta from {training['options']['beta_init']:g}"
            axes.plot(
                [it["layers"] for it in found],
                [it["largest"] for it in found],
                linestyle=style,
                color="black",
                lw=1.4,
                label=label if arithmetic == "bf16" else None,
            )
    axes.axhline(0.05, color="gray", lw=1, label="guard's default tolerance")
    if all(row["replay_bit_equal"] for row in report["rows"]):
        depths = sorted({row["layers"] for row in report["rows"]})
        label = "replay: exactly 0,\nevery gain and arithmetic"
        axes.plot(
            depths, [floor] * len(depths), "v", color="crimson", ms=8, clip_on=False, label=label
        )
    axes.set(yscale="log", ylim=(floor, ceiling), xlabel="layers crossed")
    axes.set_ylabel("relative RMS error, the largest of the chain")
    axes.set_title("invert: bf16 (full lines) and fp32 (dashed)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_bytes(axes: Any, report: Json) -> None:
    names = list(report["sides"])[::-1]
    for at, name in enumerate(names):
        side = report["sides"][name]
        peak, kept = side["peak"]["measured"] / 2**20, side["kept"]["closed_form"] / 2**20
        closed = side["peak"]["closed_form"] / 2**20
        first = at == 0
        axes.barh(at, peak, color="#b7cfe8", label="peak of a step, traced" if first else None)
        axes.barh(at, kept, height=0.5, color="#1f4e79", label="kept" if first else None)
        mark = "peak, closed form" if first else None
        axes.plot([closed], [at], "|", color="black", ms=16, label=mark)
        axes.annotate(f"{kept:,.0f} / {peak:,.0f}", (peak, at), (6, 0), va="center",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    options = report["options"]
    axes.set_xlim(0, 1.2 * max(it["peak"]["measured"] for it in report["sides"].values()) / 2**20)
    axes.set_xlabel("MiB; the gradients of parameters are not counted")
    axes.set_title(
        f"{options['preset']}, {options['micro_batch']} x {options['length']} tokens, "
        f"{options['precision']}",
        fontsize=10,
    )
    axes.legend(fontsize=8, loc="lower right")


# --- the program ----------------------------------------------------------------------------------

Parser = argparse.ArgumentParser
PARTS: dict[str, Callable[[Any], None]] = {"paper": paper, "figure": figure, "table": table}
SUFFIXES = {"figure": "png", "table": "md"}


def arguments(parser: Parser) -> None:
    """The command line of every part."""
    parts = parser.add_subparsers(metavar="PART")
    for name, part in PARTS.items():
        words = add_part(parts, name, part)
        if name != "paper":
            words.add_argument("files", type=Path, nargs="*")
        if name == "table":
            words.add_argument(
                "--write", type=Path, help="Markdown with <!-- table: NAME --> <!-- end -->"
            )


def add_part(parts: Any, name: str, part: Callable[[Any], None]) -> Parser:
    words = parts.add_parser(name)
    words.set_defaults(part=part)
    words.add_argument("--out", type=Path, default=argparse.SUPPRESS)
    return words


def run_parts(
    description: str | None, arguments: Callable[[Parser], None], quick: Mapping[str, str]
) -> None:
    """Run the part that the command line names; with ``--quick`` every part of ``quick``, as its
    words say, into the folder ``--out``."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every part at a tiny shape")
    parser.add_argument("--out", type=Path, help="file; with --quick a folder")
    arguments(parser)
    given = parser.parse_args()
    if hasattr(given, "part") and not given.quick:
        run_part(given)
        return
    if hasattr(given, "part") or not given.quick or given.out is None:
        parser.error(f"name a part ({', '.join(quick)}), or say --quick --out FOLDER")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, words in quick.items():
        out = given.out / f"{name}.{SUFFIXES.get(name, 'json')}"
        run_part(parser.parse_args([name, "--out", str(out), *words.split()]))


def run_part(given: argparse.Namespace) -> None:
    if getattr(given, "threads", None):
        torch.set_num_threads(given.threads)
    given.part(given)


if __name__ == "__main__":
    run_parts(__doc__, arguments, dict.fromkeys(PARTS, ""))
