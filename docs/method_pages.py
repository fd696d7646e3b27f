"""Write a page for every method, methods/NAME.md, and the table of all of them, methods.md.

    python docs/method_pages.py

What a page says is in the code: the method's docstring, its options, what the cost model answers,
what the checks of a configuration refuse. A test writes the pages anew and compares.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from docstring_parser import parse_from_object

from crnet import architectures, linears, optimizers, schedules, streams
from crnet.config import presets
from crnet.config.check import check, policy_problem
from crnet.config.sections import SIZES, RunConfig, choose
from crnet.config.serialize import override
from crnet.config.units import GIB
from crnet.cost.kept import kept_bytes
from crnet.cost.parameters import num_parameters
from crnet.cost.step import step_flops
from crnet.cost.table import plans
from crnet.cost.workload import Workload, workload
from crnet.errors import ConfigError
from crnet.hub.export import plain_problems
from crnet.recompute.plan import POLICIES

HERE = Path(__file__).parent
PRESET = "llama-130m"
RANK = "256"
"""Where a table has no ranks for a method at this shape."""
SEAMS: dict[str, tuple[ModuleType, str, str]] = {
    "parameterizations": (linears, "model", "linear"),
    "streams": (streams, "model", "stream"),
    "architectures": (architectures, "model", "architecture"),
    "optimizers": (optimizers, "optimizer", "name"),
    "schedules": (schedules, "optimizer", "schedule"),
}
"""By the title of a seam: its package, and the key that chooses."""
NOTE = "<!-- Written by docs/method_pages.py: change the method's docstring, then run it. -->"
WORDS = "Source|Deviation|Unverified|Events|Refused|Released"
"""What stands before a colon where a docstring says where a method is from."""
Page = tuple[Path, str]


def pages() -> Iterator[Page]:
    """Every page, by its path under docs/, the table of all first."""
    methods = [
        (title, seam.get(name)) for title, (seam, *_) in SEAMS.items() for name in seam.names()
    ]
    named = [method.name for _, method in methods]
    assert len(set(named)) == len(named), "two methods have one page"
    yield Path("methods.md"), table()
    for title, method in methods:
        yield Path("methods") / f"{method.name}.md", page(title, method)


def page(title: str, method: Any) -> str:
    """Of one method."""
    _, section, key = SEAMS[title]
    parts = [
        f"# {method.name}",
        NOTE,
        f"{sentence(method.summary)} `--{section}.{key} {method.name}`, one of the {title}.",
        *texts(method),
        *options(method, section),
        *costs(title, method),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def sentence(summary: str) -> str:
    """With a capital and a full stop."""
    return f"{summary[0].upper()}{summary[1:]}."


def texts(method: Any) -> list[str]:
    """What the file and the class say of it."""
    module = inspect.getmodule(type(method))
    shared = len(getattr(module, "METHODS", ())) > 1
    found = [inspect.cleandoc(module.__doc__ or "")] if module else []
    own = vars(type(method)).get("__doc__")
    if own and (shared or not found):
        found.append(inspect.cleandoc(own))
    return [markdown(text) for text in found]


def markdown(text: str) -> str:
    """Double backticks are single ones, the words before a colon bold."""
    text = text.replace("``", "`")
    return re.sub(rf"(^|(?<=\. ))({WORDS}):", r"\1**\2**:", text, flags=re.M)


def options(method: Any, section: str) -> list[str]:
    """A table of the method's keys."""
    if method.Options is None:
        return []
    bases = [each for each in reversed(method.Options.__mro__) if dataclasses.is_dataclass(each)]
    told = [param for base in bases for param in parse_from_object(base).params]
    found = {each.arg_name: each.description for each in told}
    lines = ["## Options", "", "| key | default | |", "|---|---|---|"]
    for field in dataclasses.fields(method.Options):
        flag = f"--{section}.{method.name}.{field.name.replace('_', '-')}"
        text = " ".join((found.get(field.name) or "").replace("|", "\\|").split())
        default = "none" if field.default is None else f"{field.default}".lower()
        lines.append(f"| `{flag}` | `{default}` | {text} |")
    return ["\n".join(lines)]


def costs(title: str, method: Any) -> list[str]:
    """What it costs at one shape, and what it can be run with."""
    if title == "schedules":
        return []
    is_optimizer = title == "optimizers"
    names = STATE if is_optimizer else tuple(FIGURES)
    config = chosen(title, method.name)
    try:
        check(config)
    except ConfigError as error:
        return [f"## Cost\n\nNot answered at the shape of `{PRESET}`: {error}"]
    work, full = workload(config), workload(chosen("parameterizations", "full"))
    end = work.at_end()
    columns = {"here": work, **({"at the end": end} if end else {}), "full rank": full}
    lines = [
        "## Cost",
        "",
        f"At the shape of `{PRESET}`{_ranks(title, work)}, fp32, {work.micro_batch.sequences} x "
        f"{work.micro_batch.length} tokens a step; beside full rank under AdamW.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows(list(columns.values()), names)),
    ]
    if is_optimizer:
        return ["\n".join(lines)]
    return ["\n".join(lines), "\n".join(["## Runs with", "", *allowed(config, work)])]


def rows(works: Sequence[Workload], names: Sequence[str]) -> Iterator[list[str]]:
    """Figure by figure, of each of these."""
    for name in names:
        yield [name, *(FIGURES[name](work) for work in works)]


def state_of(name: str, work: Workload) -> str:
    """A term of what stays between steps."""
    return f"{work.state_bytes.get(name.removesuffix(', GiB'), 0) / GIB:.3f}"


def kept_a_token(policy: str, work: Workload) -> str:
    """What blocks keep for the backward pass, over tokens and blocks."""
    if policy not in (known := plans(work)):
        return "-"
    terms = kept_bytes(work.micro_batch, known[policy])  # type: ignore[index]
    blocks = sum(terms[name] for name in ("stream", "outputs", "bottlenecks", "inside"))
    return f"{blocks / work.micro_batch.rows / work.spec.num_layers:,.0f}"


STATE = ("weights, GiB", "gradients, GiB", "optimizer state, GiB")
FIGURES: dict[str, Callable[[Workload], str]] = {
    "parameters, millions": lambda it: f"{num_parameters(it.spec)['total'] / 1e6:,.2f}",
    **{name: functools.partial(state_of, name) for name in STATE},
    "TFLOPs of a step": lambda it: f"{step_flops(it, it.plan)['total'] / 1e12:,.1f}",
    **{
        f"kept a token and block, bytes, recompute {policy}": functools.partial(
            kept_a_token, policy
        )
        for policy in POLICIES
    },
}


def allowed(config: RunConfig, work: Workload) -> Iterator[str]:
    """Policies, layouts and exports, each with its refusal where there is one."""
    for policy in POLICIES:
        yield f"- `--train.recompute {policy}`: {policy_problem(work.spec, policy) or 'yes'}"
    packed = override(config, train={"keep_as": "nf4"})
    yield f"- `--train.keep-as nf4`: {refusal(packed) or 'yes'}"
    for size in SIZES:
        yield f"- `--parallel.{size} 2`: {refusal(override(config, parallel={size: 2})) or 'yes'}"
    yield f"- `crnet export --to hf-llama`: {'; '.join(plain_refusals(work)) or 'yes'}"


def refusal(config: RunConfig) -> str:
    """Why a run is none; empty where it is one."""
    try:
        check(config)
    except ConfigError as error:
        return str(error).replace("\n", " ")
    return ""


def plain_refusals(work: Workload) -> list[str]:
    """Why a model is none of transformers' own."""
    from crnet.linears._maps import LinearMap
    from crnet.model.build import lay_out

    if found := list(plain_problems(work.spec)):
        return found
    first = lay_out(work.spec).model.blocks()[-1]
    linear = first.maps[work.spec.positions[-1].name]
    if type(linear).dense_weight is LinearMap.dense_weight:
        return [f"{work.spec.linear.name}: its maps are no matrices; take --to hf"]
    try:
        linear.dense_weight()
    except NotImplementedError as error:
        return [f"{work.spec.linear.name}: {error}; take --to hf"]
    return []


def chosen(title: str, name: str) -> RunConfig:
    """The preset with one method in its place, at the ranks of the published tables."""
    base = presets.get(PRESET)
    _, section, key = SEAMS[title]
    value = choose(getattr(base, section), key, name)
    if section == "model":
        linear = linears.get(value.linear)
        shape = (value.hidden_size, value.num_layers)
        if shape not in linear.published_ranks.get("aligned-parameters", {}):
            value = dataclasses.replace(value, rank=RANK)
    elif title == "optimizers" and not optimizers.get(name).steps_pairs:
        base = dataclasses.replace(base, model=choose(base.model, "linear", "full"))
    return dataclasses.replace(base, **{section: value})


def _ranks(title: str, work: Workload) -> str:
    if title == "optimizers" and work.spec.linear.name == "full":
        return ", full rank"
    if not work.spec.linear.has_ranks:
        return ""
    found = sorted({slot.rank for block in work.spec.slots for slot in block} - {0})
    named = f" and `--model.linear {work.spec.linear.name}`" if title != "parameterizations" else ""
    return f"{named}, rank {', '.join(map(str, found))}" if found else named


def table() -> str:
    """Of all methods, seam by seam."""
    full = workload(chosen("parameterizations", "full"))
    parts = [
        "# Methods",
        NOTE,
        "Everything that stands behind a seam. Every method is held against one contract "
        "([adding_a_method.md](adding_a_method.md)); its page has its equation, its source, what "
        f"differs from that, its options and its cost. Figures at the shape of `{PRESET}`, at the "
        "ranks of the published tables: parameters, FLOPs of a step over those of full rank, bytes "
        "that a block keeps of a token with nothing recomputed and under `replay`.",
    ]
    for title, (seam, section, key) in SEAMS.items():
        has_costs = title in ("parameterizations", "streams")
        head = "| `--{}.{}` | |{}".format(section, key, " M | FLOPs | kept | replay |" * has_costs)
        lines = [f"## {title.capitalize()}", "", head, "|---|---|" + "---|" * 4 * has_costs]
        for name in seam.names():
            row = f"| [{name}](methods/{name}.md) | {seam.get(name).summary} |"
            lines.append(row + (figures(title, name, full) if has_costs else ""))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def figures(title: str, name: str, full: Workload) -> str:
    """The columns of the table."""
    config = chosen(title, name)
    if refusal(config):
        return " - | - | - | - |"
    work = workload(config)
    flops = step_flops(work, work.plan)["total"] / step_flops(full, full.plan)["total"]
    kept = " | ".join(kept_a_token(policy, work) for policy in ("none", "replay"))
    return f" {num_parameters(work.spec)['total'] / 1e6:,.1f} | {flops:.2f} | {kept} |"


def main() -> None:
    (HERE / "methods").mkdir(exist_ok=True)
    for path in (HERE / "methods").glob("*.md"):
        path.unlink()
    for path, text in pages():
        (HERE / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
