"""One HTML page from what ``gather`` found: a file that needs no network and no other file.

Tables, heat maps and words are written here and can be read without a script; curves are drawn, and
tables sorted, by ``template/page.js``.
"""

from __future__ import annotations

import json
import math
import shlex
import string
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import crnet
from crnet.config.serialize import to_json
from crnet.report.words import count, duration, exponent, safe, size

Values = dict[str, Any]

COLORS = 8
"""Runs that have a colour of their own (``page.css``)."""

Column = tuple[str, str, Callable[[Any], str]]
"""Key of a run's summary, head of its column, how a value is written."""


Section = tuple[str, str, str]
"""Name of its anchor, title, HTML."""


def page(found: Values, *, heading: str = "", above: Sequence[Section] = ()) -> str:
    """The page of ``gather``'s runs, as HTML.

    Args:
        heading: of the page; empty: the runs.
        above: what stands before them.
    """
    runs = found["runs"]
    names = [run["name"] for run in runs]
    heading = heading or (names[0] if len(names) == 1 else f"{len(names)} runs")
    body = [
        *(_section(*each) for each in above),
        alert(runs),
        tiles(runs[0]["summary"]) if len(runs) == 1 else "",
        curves(),
        summaries(runs),
        differences(found["differences"]),
        *(run_part(idx, run) for idx, run in enumerate(runs)),
    ]
    links = [(name, title) for name, title, _ in above]
    links += [("curves", "Curves"), ("runs", "Runs"), ("differences", "Configuration")]
    links += [(f"run-{idx}", name) for idx, name in enumerate(names)]
    return _template("page.html").substitute(
        title=safe(f"{heading if above else ', '.join(names)} · crnet report"),
        heading=safe(heading),
        made=safe(f"crnet report, {time.strftime('%Y-%m-%d %H:%M')}"),
        links="".join(f'<a href="#{target}">{safe(name)}</a>' for target, name in links),
        legend=legend(names),
        body="\n".join(filter(None, body)),
        version=safe(crnet.__version__),
        data=_in_script(runs),
        style=_template("page.css").template,
        script=_template("page.js").template,
    )


def _template(name: str) -> string.Template:
    file = resources.files("crnet.report") / "template" / name
    return string.Template(file.read_text(encoding="utf-8"))


def _in_script(runs: Sequence[Values]) -> str:
    """What the script draws, as JSON that no markup in it can end."""
    keys = ("name", "training", "validation", "spectra")
    drawn = {"runs": [{key: run[key] for key in keys} for run in runs]}
    return to_json(drawn).replace("<", "\\u003c")


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _state(value: str) -> str:
    return f'<span class="badge {safe(value)}">{safe(value)}</span>'


COLUMNS: tuple[Column, ...] = (
    ("state", "state", _state),
    ("method", "method", safe),
    ("preset", "preset", safe),
    ("parameters", "parameters", count),
    ("block_parameters", "in blocks", count),
    ("tokens", "tokens", count),
    ("step", "step", lambda value: f"{value:,}"),
    ("train_loss", "loss", _loss),
    ("val_loss", "validation loss", _loss),
    ("val_perplexity", "perplexity", lambda value: f"{value:,.2f}"),
    ("val_bits_per_byte", "bits per byte", _loss),
    ("val_accuracy", "accuracy", _loss),
    ("seconds", "training time", duration),
    ("tokens_per_s", "tokens/s", count),
    ("flops", "FLOPs", exponent),
    ("peak_bytes", "peak memory", size),
    ("predicted_bytes", "predicted memory", size),
    ("precision", "precision", safe),
    ("device", "device", safe),
)
WORDS = {"state", "method", "preset", "precision", "device"}
LEAST_IS_BEST = {"val_loss", "val_perplexity", "val_bits_per_byte"}


def _cell(key: str, value: Any, write: Callable[[Any], str], is_best: bool = False) -> str:
    classes = [*(["n"] if key not in WORDS else []), *(["best"] if is_best else [])]
    of_class = f' class="{" ".join(classes)}"' if classes else ""
    missing = value is None or (isinstance(value, float) and not math.isfinite(value))
    sorted_by = "" if missing else safe(value)
    shown = ("-" if value is None else "not finite") if missing else write(value)
    return f'<td{of_class} data-value="{sorted_by}">{shown}</td>'


# Parts of the page


def legend(names: Sequence[str]) -> str:
    """Every run's name in its colour: shows and hides what is the run's. Of one run: nothing."""
    if len(names) == 1:
        return ""
    chips = (
        f'<button type="button" class="chip" aria-pressed="true">{_dot(idx)}{safe(name)}</button>'
        for idx, name in enumerate(names)
    )
    return f'<div class="legend" role="group" aria-label="Runs shown">{"".join(chips)}</div>'


def _dot(idx: int) -> str:
    return f'<span class="dot" style="--run: var(--run-{idx % COLORS})"></span>'


def alert(runs: Sequence[Values]) -> str:
    """What is damaged, in whichever run."""
    problems = [problem for run in runs for problem in run["problems"]]
    if not problems:
        return ""
    items = "".join(f"<li>{safe(problem)}</li>" for problem in problems)
    return f'<div class="alert" role="alert">Not everything could be read.<ul>{items}</ul></div>'


def tiles(summary: Values) -> str:
    """The figures of a single run that are looked for first."""
    shown = {
        "val_perplexity": "validation perplexity",
        "val_loss": "validation loss",
        "val_bits_per_byte": "bits per byte",
        "parameters": f"parameters, {count(summary['block_parameters'])} in blocks",
        "tokens": f"tokens, step {summary['step']:,} of {summary['steps']:,}",
        "seconds": "training time",
        "tokens_per_s": "tokens a second",
        "flops": "FLOPs",
    }
    write = {key: written for key, _, written in COLUMNS}
    found = [
        f'<div class="card tile"><b>{write[key](summary[key])}</b><span>{safe(name)}</span></div>'
        for key, name in shown.items()
        if summary.get(key) is not None
    ]
    return f'<div class="tiles">{"".join(found)}</div>'


def curves() -> str:
    """The frame of the curves and what the reader chooses of them."""
    axes = [("step", "steps"), ("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "time")]
    buttons = "".join(
        f'<button type="button" value="{key}" aria-pressed="{str(key == "step").lower()}">'
        f"{name}</button>"
        for key, name in axes
    )
    return f"""<section id="curves"><h2>Curves</h2>
<div class="bar"><div class="choice" id="axis" role="group" aria-label="Against">{buttons}</div>
<label><input type="checkbox" id="log-x"> log</label>
<label>smoothing <input type="range" id="smoothing" min="0" max="1" step="0.05" value="0.6"></label>
<button type="button" class="small" id="reset" disabled>show everything</button>
<span class="note">Drag to zoom, double-click to reset.</span></div>
<noscript><p class="note">The curves need JavaScript; the tables do not.</p></noscript>
<div class="charts"></div></section>"""


def summaries(runs: Sequence[Values]) -> str:
    """A row a run, a column a figure that at least one of them has."""
    rows = [run["summary"] for run in runs]
    columns = [each for each in COLUMNS if any(row.get(each[0]) is not None for row in rows)]
    least = {
        key: min((row[key] for row in rows if _is_finite(row.get(key))), default=None)
        for key in LEAST_IS_BEST
    }
    lines = []
    for idx, run in enumerate(runs):
        cells = ""
        for key, _, write in columns:
            value = run["summary"].get(key)
            is_best = len(runs) > 1 and value is not None and value == least.get(key)
            cells += _cell(key, value, write, is_best)
        head = f'<th scope="row">{_dot(idx)} <a href="#run-{idx}">{safe(run["name"])}</a></th>'
        lines.append(f"<tr>{head}{cells}</tr>")
    heads = [("run", False), *((head, key not in WORDS) for key, head, _ in columns)]
    return _section("runs", "Runs", table_of(heads, lines))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _section(name: str, title: str, content: str) -> str:
    return (
        f'<section id="{name}"><h2>{title}</h2><div class="card scroll">{content}</div></section>'
    )


def table_of(heads: Iterable[tuple[str, bool]], lines: Iterable[str]) -> str:
    """A table that can be sorted. ``heads``: word, and whether its column holds numbers."""
    cells = "".join(
        f'<th scope="col"{" class=n" if is_number else ""}><button type="button">{safe(name)}'
        "</button></th>"
        for name, is_number in heads
    )
    return (
        f'<table class="sortable"><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table>"
    )


def differences(found: Values) -> str:
    """Keys of the configurations that are not the same everywhere."""
    if not found["rows"]:
        text = '<p class="note">Every key has the same value.</p>'
        return _section("differences", "Configuration", text)
    lines = []
    for key, *values in found["rows"]:
        cells = "".join(f"<td><code>{safe(_plain(value))}</code></td>" for value in values)
        lines.append(f'<tr><th scope="row"><code>{safe(key)}</code></th>{cells}</tr>')
    heads = [("key that differs", False), *((name, False) for name in found["columns"])]
    return _section("differences", "Configuration", table_of(heads, lines))


def _plain(value: Any) -> str:
    """A value of a configuration as a person writes it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value)


def run_part(idx: int, run: Values) -> str:
    """What is shown of one run alone."""
    saved = run["checkpoint"]
    at = f"checkpoint of step {saved['step']:,}" if saved else "no checkpoint yet"
    parts = [
        _card("History", history(run["history"])),
        _card("Sample", sample(run["sample"])) if run["sample"] else "",
        *(gains(each) for each in run["gains"]),
        *spectra(idx, run["spectra"]),
        _card("Ranks", ranks(run["ranks"])),
        _card("Manifest", manifest(run["manifest"])),
    ]
    return f"""<section class="run" id="run-{idx}" data-run-index="{idx}">
<header>{_dot(idx)}<h2>{safe(run["name"])}</h2>{_state(run["summary"]["state"])}
<p>{safe(run["folder"])}, {safe(at)}</p></header>
<div class="parts">{"".join(parts)}</div></section>"""


def _card(title: str, content: str, more: str = "", attributes: str = "") -> str:
    start = f'<div class="card part{more}"{attributes}>'
    return f"{start}<h3>{safe(title)}</h3>{content}</div>"


def history(events: Sequence[Values]) -> str:
    """Starts, failures and the end, one line each."""
    lines = []
    for event in events:
        at = f"<time>{safe(event['time'])}</time>" if event["time"] else ""
        kind = "badge failure" if event["kind"] == "failure" else "badge"
        step = f'<span><span class="{kind}">step {event["step"]:,}</span></span>'
        lines.append(f"<li>{step}<span>{safe(event['text'])}{at}</span></li>")
    return f'<ol class="history">{"".join(lines)}</ol>'


def sample(found: Values) -> str:
    """A text of the model, and how it was drawn."""
    how = ", ".join(f"{key.replace('_', ' ')} {found[key]}" for key in found if key != "text")
    return (
        f'<pre class="sample" tabindex="0">{safe(found["text"])}</pre>'
        f'<p class="note">From an empty prompt, drawn the same way for every run: {safe(how)}.</p>'
    )


def gains(found: Values) -> str:
    """Histogram, heat map and quantiles of one kind of gain."""
    quantiles = found["quantiles"]
    values = [value for row in found["values"] for value in row if value is not None]
    heads = "".join(f'<th scope="col" class="n">{float(key):.0%}</th>' for key in quantiles)
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f'<td class="n">{write(value)}</td>' for value in quantiles.values())
        + "</tr>"
        for name, write in (("|gain|", lambda v: f"{v:.4g}"), ("ln |gain|", _logarithm))
    )
    shares = ", ".join(f"{name}: {value:.3g}" for name, value in found["shares"].items())
    negative = f", {found['negative']} of them negative" if found["negative"] else ""
    text = f"{found['count']} gains{negative}. Shares in the paper's intervals: {shares}."
    return _card(
        f"Gains ({found['name']})",
        histogram(values)
        + heat(found["positions"], found["values"], gain_tone(values), lambda v: f"{v:.3f}")
        + f'<div class="scroll"><table><thead><tr><th scope="col">quantile</th>{heads}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">{safe(text)}</p>',
        " wide",
    )


def _logarithm(value: float) -> str:
    return f"{math.log(value):.3f}" if value > 0 else "-∞"


def gain_tone(values: Sequence[float]) -> Callable[[float], tuple[float, str]]:
    """How strongly a gain is coloured, of 100, and in which colour: its logarithm's, 0 at 1 and
    strongest where the values' own is."""

    def logarithm(value: float) -> float:
        return math.log(max(abs(value), 1e-6))

    most = max(0.05, *(abs(logarithm(value)) for value in values))

    def tone(value: float) -> tuple[float, str]:
        return 75 * abs(logarithm(value)) / most, f"var(--{'cold' if abs(value) < 1 else 'warm'})"

    return tone


def histogram(values: Sequence[float], bins: int = 28) -> str:
    """How many gains lie where, in equal steps of the logarithm of their absolute value."""
    logs = [math.log(max(abs(value), 1e-6)) for value in values]
    low, high = min(logs), max(logs)
    low, high = (low - 0.05, high + 0.05) if high - low < 1e-9 else (low, high)
    counts = [0] * bins
    for each in logs:
        counts[min(bins - 1, int((each - low) / (high - low) * bins))] += 1
    width, height, most = 640 / bins, 90, max(counts)
    bars = "".join(
        f'<rect class="column" x="{idx * width + 1:.1f}" y="{height - tall:.1f}" rx="2" '
        f'width="{width - 2:.1f}" height="{tall:.1f}"><title>{number} from '
        f"{math.exp(low + (high - low) * idx / bins):.3f}</title></rect>"
        for idx, number in enumerate(counts)
        for tall in [height * number / most]
    )
    words = "".join(
        f'<text x="{640 * share:.0f}" y="{height + 15}" text-anchor="{anchor}">'
        f"{math.exp(low + (high - low) * share):.3f}</text>"
        for share, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"),
                              (1, "end"))
    )  # fmt: skip
    one = -low / (high - low) * 640
    mark = f'<line class="mark-line" x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="{height}"/>'
    label = f"Histogram of {len(values)} gains"
    start = (
        f'<svg class="histogram" viewBox="0 0 640 {height + 20}" role="img" aria-label="{label}">'
    )
    return f"{start}{bars}{mark if 0 < one < 640 else ''}{words}</svg>"


def heat(
    positions: Sequence[str],
    rows: Sequence[Sequence[Any]],
    tone: Callable[[Any], tuple[float, str]],
    write: Callable[[Any], str],
) -> str:
    """A table with a cell for every block and position, coloured by its value."""
    heads = "".join(f'<th scope="col">{safe(name)}</th>' for name in positions)
    lines = []
    for idx, row in enumerate(rows, 1):
        cells = ""
        for value in row:
            if value is None:
                cells += "<td>·</td>"
            else:
                strength, color = tone(value)
                style = f"--v: {strength:.0f}; --tone: {color}"
                cells += f'<td class="cell" style="{style}">{write(value)}</td>'
        lines.append(f'<tr><th scope="row">{idx}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th scope="col">block</th>{heads}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def ranks(found: Values) -> str:
    """The rank of every map."""
    most = max((value for row in found["values"] for value in row if value), default=1)
    text = '<p class="note">A dot: a dense map.</p>'

    def tone(value: int) -> tuple[float, str]:
        return 10 + 60 * value / most, "var(--heat)"

    return heat(found["positions"], found["values"], tone, str) + text


def spectra(idx: int, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cards: singular values, and the two ranks that they say."""
    if not found:
        return []
    positions = list(dict.fromkeys(each["position"] for each in found))
    options = "".join(f"<option>{safe(name)}</option>" for name in positions)
    curve = _card(
        "Singular values",
        f'<div class="bar"><label>position <select>{options}</select></label></div>'
        '<svg role="img" aria-label="Singular values by index, one line a block"></svg>'
        '<p class="note">Over the largest one, by their place. A line a block: blue the first, red '
        "the last.</p>",
        attributes=f' data-spectra="{idx}"',
    )
    blocks = max(each["block"] for each in found)
    cards = [curve]
    for key, title in (("effective_rank", "Effective rank"), ("stable_rank", "Stable rank")):
        rows: list[list[Any]] = [[None] * len(positions) for _ in range(blocks)]
        for each in found:
            share = each[key] / each["rank"]
            rows[each["block"] - 1][positions.index(each["position"])] = (each[key], share)
        table = heat(
            positions, rows, lambda v: (8 + 72 * v[1], "var(--heat)"), lambda v: f"{v[0]:.1f}"
        )
        cards.append(_card(title, table + f'<p class="note">{safe(_MEANING[key])}</p>'))
    return cards


_DARK = "The darker, the nearer to the map's rank."
_MEANING = {
    "effective_rank": f"exp of the entropy of the singular values' shares of their sum. {_DARK}",
    "stable_rank": f"The sum of the singular values' squares over the largest one's. {_DARK}",
}


def manifest(found: Mapping[str, Any]) -> str:
    """What was run, on what, from which code; the whole file behind it."""
    commit = str(found.get("commit") or "not known")[:12]
    changed = " (changed)" if found.get("dirty") else ""
    versions = (f"{name} {found.get(name)}" for name in (crnet.__name__, "torch", "python"))
    lines = {
        "command": shlex.join(map(str, found.get("command_line") or [])),
        "begun": found.get("time"),
        "device": f"{found.get('device')}, {found.get('threads')} threads",
        "code": f"{', '.join(versions)}; commit {commit}{changed}",
        "recomputation": (found.get("recompute") or {}).get("policy"),
        "data": ", ".join((found.get("config") or {}).get("data", {}).get("source", [])),
    }
    items = "".join(f"<dt>{name}</dt><dd>{safe(value)}</dd>" for name, value in lines.items())
    whole = safe(to_json(found, indent=1))
    return (
        f"<dl>{items}</dl><details><summary>all of run.json</summary>"
        f'<pre class="sample">{whole}</pre></details>'
    )
