"""The arithmetic of the paper's tables 1, 2, 3, 19 and 22, recomputed cell by cell, and its errata.

Source: arXiv:2509.18993. A cell agrees when the recomputed figure, rounded to the printed digits,
is the printed one. Where it does not, ``why`` says which input gives the print; "unexplained"
means that none was found, and what follows the word is arithmetic, not a cause. Perplexities and
throughputs are measurements and left out.

Symbols: L blocks, h hidden size, f feed-forward width, a heads, r rank, s tokens of a sequence,
b kept layers (the paper's |A|). FLOPs are of products only, 2 an item. "GB" means GiB.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from crnet import linears
from crnet.config import presets
from crnet.config.sections import ModelConfig

GIB = 2**30
VOCAB_SIZE = 32_000  # LLaMA-2's; the paper does not say
BATCH_TOKENS = 512 * 256  # E.2.1
A100_FLOPS, PCIE_BYTES = 312e12, 64e9  # a second, appendix G
WIDTH = 8 / 3
"""f / h where the paper writes a number for it (C.2, G)."""
PRESET = {size: f"llama-{size.lower()}" for size in "60M 130M 350M 1B 7B 13B 70B".split()}
"""Tables 9 and 21."""
BASELINE_RANK = {"60M": 128, "130M": 256, "350M": 256, "1B": 512, "7B": 1024}
"""Of LoRA, SLTrain, GaLore, CoLA (arXiv:2403.03507): they give CoLA's counts in table 3."""
SLTRAIN_DENSITY = 0.03
"""Of the sparse part, indices free (arXiv:2406.02214): it gives SLTrain's counts in table 3."""


@dataclass(frozen=True)
class Cell:
    """One figure, or one formula, of a table."""

    row: str
    column: str
    formula: str
    value: float | str
    """Recomputed, in the unit that is printed; text where the paper prints a formula."""
    printed: str
    why: str = ""
    again: float | None = None
    """Recomputed with the input that ``why`` names: it reads as printed."""

    @property
    def agrees(self) -> bool:
        if isinstance(self.value, str):
            return self.value == self.printed
        return reads_as(self.value, self.printed)


@dataclass(frozen=True)
class Table:
    """A table of the paper; the notes say which equations are used."""

    title: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Erratum:
    """A disagreement inside the paper that is not a cell of the five tables."""

    place: str
    printed: str
    meant: str
    why: str = ""
    value: float | None = None
    """The first number of ``meant``, recomputed; None where no number is at stake."""


def number(text: str) -> tuple[float, float]:
    """The first number in a text, ``1.005 x 10^13`` or ``13.1K``, and a unit of its last digit."""
    match = re.search(r"(\d[\d,]*)(?:\.(\d+))?(K\b)?(?: x 10\^(\d+))?", text)
    assert match, f"no number in {text!r}"
    whole, digits, thousand, power = match.groups()
    scale = 10.0 ** int(power or 0) * (1000 if thousand else 1)
    return float(f"{whole.replace(',', '')}.{digits or 0}") * scale, scale / 10 ** len(digits or "")


def reads_as(value: float, printed: str) -> bool:
    """Whether a value, rounded to the digits of the printed number, is that number."""
    wanted, unit = number(printed)
    return abs(value - wanted) <= unit / 2 * (1 + 1e-9)


Terms = Mapping[str, int]
"""A formula as {product of sizes: factor}; ``{"shh": 24}`` is 24 s h^2."""
FULL: Terms = {"shh": 24, "ssh": 12, "shf": 18}
LOW: Terms = {"shr": 48 + 18, "ssh": 12, "sfr": 18}
TABLE_1: dict[str, Terms] = {  # one layer; CR-Net's first is FULL, its others are LOW (eq. 10)
    "Full-rank": FULL,
    "(Re)LoRA": {"shh": 40, "ssh": 24, "shf": 30},
    "SLTrain": {**FULL, "hhr": 24, "hfr": 18},
    "GaLore": {**FULL, "hhr": 16, "hfr": 12},
    "CoLA": LOW,
    "CR-Net": LOW,
}


def counted(method: str) -> dict[str, int]:
    """Terms of table 1 for one layer (not CR-Net's first), from the products of a step.

    Forward and backward are three products a map (B.2, eq. 35, 36): the output, the gradients of
    the input and of the weight. Attention has two, thrice. LoRA's frozen weight has no gradient.
    SLTrain forms B A and its two gradients. GaLore projects the gradient, and the update back.
    """
    factored = method in ("(Re)LoRA", "CoLA", "CR-Net")
    passes = {"(Re)LoRA": 2, "CoLA": 0, "CR-Net": 0}.get(method, 3)
    terms = Counter({"ssh": 3 * 2 * 2})
    for map_ in ("hh", "hh", "hh", "hh", "hf", "hf", "hf"):
        terms[f"s{map_}"] += 2 * passes
        terms[f"{map_}r"] += 2 * {"SLTrain": 3, "GaLore": 2}.get(method, 0)
        for side in map_ if factored else "":
            terms[f"s{side}r"] += 2 * 3
    return {term: factor for term, factor in terms.items() if factor}


def written(terms: Terms) -> str:
    """``24sh^2 + 12s^2h + 18shf``."""
    order = ["shh", "shr", "ssh", "shf", "sfr", "hhr", "hfr"]
    names = sorted(terms, key=order.index)
    return " + ".join(f"{terms[it]}" + re.sub(r"(.)\1", r"\1^2", it) for it in names)


def step_flops(
    method: str, model: ModelConfig, ranks: Sequence[int] = (), tokens: int = 256, ssh: int = 12
) -> float:
    """FLOPs of a step on one sequence by table 1 (CR-Net: eq. 10); ``ranks`` of the low-rank
    layers, none for full rank; ``ssh`` for the 12 of attention's 12 s^2 h."""

    def layer(terms: Terms, rank: int) -> float:
        size = {"s": tokens, "h": model.hidden_size, "f": model.intermediate_size, "r": rank}
        terms = {**terms, "ssh": terms["ssh"] * ssh // 12}
        return sum(factor * math.prod(size[it] for it in term) for term, factor in terms.items())

    first = [layer(FULL, 0)] if method == "CR-Net" else []
    return sum(first + [layer(TABLE_1[method], it) for it in ranks or [0] * model.num_layers])


def again_flops(
    model: ModelConfig, rank: int, rebuilt: int, factor: float = 62 / 3, tokens: int = 256
) -> float:
    """FLOPs of recomputation on one sequence, 20.67 n s h r + 4 L s^2 h, 20.67 being 10 + 4 f/h.

    ``rebuilt`` is n: L - b for CR-Net (eq. 39), L for CoLA-M (eq. 41). Vanilla GCP's is n = L, r =
    h and 24, that is 8 + 6 f/h.
    """
    h = model.hidden_size
    return factor * rebuilt * tokens * h * rank + 4 * model.num_layers * tokens**2 * h


def shape(size: str, linear: str = "full", rank: str = "aligned-parameters") -> ModelConfig:
    """The model of a size (tables 9, 21) in a parameterization, with a schedule of ranks."""
    model = presets.get(PRESET[size]).model
    return replace(model, linear=linear, rank=rank, vocab_size=VOCAB_SIZE)


def parameters(size: str, linear: str = "full", rank: str = "aligned-parameters") -> int:
    """All parameters: eq. 8, the norms, embedding and untied head."""
    return sum(linears.num_parameters(shape(size, linear, rank)).values())


def dense(size: str) -> int:
    """Items of the full-rank maps of all layers, L (4 h^2 + 3 h f)."""
    return sum(linears.num_parameters(shape(size))[position] for position in linears.POSITIONS)


def cola(size: str, rank: int | None = None) -> int:
    """CoLA's and LORO's parameters: every layer low rank, L (11 h r + 3 f r) and the rest."""
    return parameters(size, "lowrank", str(rank or BASELINE_RANK[size]))


def adam_gib(items: float) -> float:
    """GiB of weights, gradients and two states in bf16: 4 x the parameters (eq. 9)."""
    return 8 * items / GIB


def kept_items(model: ModelConfig, rank: int, kept: int, tokens: int = 256) -> int:
    """Items algorithm 1 keeps of a sequence, (L + 5b) s h + 2b s f + 7 (L - 1) s r (eq. 38)."""
    h, f, layers = model.hidden_size, model.intermediate_size, model.num_layers
    return tokens * ((layers + 5 * kept) * h + 2 * kept * f + 7 * (layers - 1) * rank)


def _table_1() -> Table:
    wrong = {"(Re)LoRA": "print is a full-rank step (24, 12, 18) plus the frozen maps' two passes "
             "(16, 12, 12): attention counted twice, the adapters not at all"}  # fmt: skip
    cells = []
    for method, terms in TABLE_1.items():
        value, printed = f"L({written(counted(method))})", f"L({written(terms)})"
        if method == "CR-Net":
            value = f"{written(counted('Full-rank'))} + (L - 1)({written(counted(method))})"
            printed = f"{written(FULL)} + (L - 1)({written(terms)})"
        cells.append(Cell(method, "FLOPs", "B.2", value, printed, wrong.get(method, "")))
    notes = (
        "A map m to n: 3 products of 2smn; low rank, 3 of 2sr(m + n). LoRA: 2 of 2smn, 3 of 2sr(m "
        "+ n). SLTrain, GaLore: full rank and 3, 2 of 2mnr. Brackets are multiplied out.",
    )
    return Table("Table 1: FLOPs of a gradient step on one sequence", notes, tuple(cells))


EXTRA_GIB = 16 / 1024
"""What the prints of table 2 have more, CR-Net's apart; cause unknown."""


def memory_2(method: str, rank: int = 0) -> float:
    """GiB of table 2 at 7B: ``adam_gib`` and 16 sequences of 256 tokens' activations, in bf16."""
    model, items = shape("7B"), parameters("7B")
    layers, h = model.num_layers, model.hidden_size
    if method == "Vanilla GCP":
        widths = layers * h
    elif method == "CoLA-M":
        items, widths = cola("7B", rank), 2 * layers * h + 7 * layers * rank
    elif method == "CR-Net":
        items = parameters("7B", "crnet", str(rank))
        widths = (layers + 10 * 4) * h + 7 * (layers - 1) * rank
    else:
        widths = layers * ((10 + 4 * WIDTH) * h + 2 * 256 * model.num_heads)
    return adam_gib(items) + 2 * 16 * 256 * widths / GIB


def flops_2(method: str, rank: int = 0, width: float = WIDTH) -> float:
    """FLOPs of table 2 at 7B, 16 sequences of 256 tokens: step and what is computed again.

    ``width`` is f / h in the latter. C.2 ascribes to CoLA half of the maps' FLOPs instead of 10 +
    4 f/h, that is 8 + 3 (1 + f/h): counted so unless f = 8/3 h.
    """
    model = shape("7B")
    layers, h = model.num_layers, model.hidden_size
    if method == "CR-Net":
        step = step_flops(method, model, [rank] * (layers - 1))
        return 16 * (step + again_flops(model, rank, layers - 4))
    if method == "CoLA-M":
        factor = 10 + 4 * width if width == WIDTH else 8 + 3 * (1 + width)
        step = step_flops("CoLA", model, [rank] * layers)
        return 16 * (step + again_flops(model, rank, layers, factor))
    again = again_flops(model, h, layers, 8 + 6 * width) if method == "Vanilla GCP" else 0
    return 16 * (step_flops("Full-rank", model) + again)


def _table_2() -> Table:
    gcp, colam, crnet, full = "Vanilla GCP", "CoLA-M", "CR-Net", "Full-rank"
    six, tens = f"{8 + 6 * WIDTH:.0f}", f"{10 + 4 * WIDTH:.2f}"
    # Full rank without scores, f = 11,008: what the print has room for.
    bare = adam_gib(parameters("7B")) + 20.75 + EXTRA_GIB
    # fmt: off
    cells = [
        Cell(gcp, "activations", "X", "Lsh", "Lsh"),
        Cell(colam, "activations", "X, X + Y^O; XA", "2Lsh + 7Lsr", "2Lsh + 7Lsr"),
        Cell(crnet, "activations", "eq. 38", f"(L + {5 + 2 * WIDTH:.2f}b)sh + 7(L - 1)sr",
             "(L + 10b)sh + 7(L - 1)sr", "10b is (5 + 2f/h)b of eq. 38 rounded; 48 MiB more here"),
        Cell(full, "activations", "10 + 4 f/h", f"{tens}Lsh + 2Ls^2a", "20.67Lsh + 2Ls^2a"),
        Cell(gcp, "re-compute", "8 + 6 f/h", f"{six}Lsh^2 + 4Ls^2h", "24Lsh^2 + 4Ls^2h"),
        Cell(colam, "re-compute", "eq. 41", f"{tens}Lshr + 4Ls^2h", "20.67Lshr + 4Ls^2h"),
        Cell(crnet, "re-compute", "eq. 39", f"{tens}(L - b)shr + 4Ls^2h",
             "20.67(L - b)shr + 4Ls^2h"),
    ]
    caption, power = "caption says r = 512; the print needs r = ", "exponent misprinted: 10^14"
    rows = {  # the caption's rank; memory and FLOPs, the reasons, the prints reproduced; ratios
        gcp: (0, "51.22", "unexplained: 16 MiB more would do", memory_2(gcp) + EXTRA_GIB,
              "2.119", f"{power}; 23Lsh^2, that is f = 2.5h, and not the row's own 24Lsh^2",
              flops_2(gcp, width=2.5), "1.000", "1.000"),
        colam: (512, "24.78", f"{caption}1024 (24.77); its last digit is unexplained: 16 MiB more "
                "would do", memory_2(colam, 1024) + EXTRA_GIB,
                "0.752", f"{power}; r = 1024; 18.5Lshr, half of the maps at f = 2.5h, which C.2 "
                "rejects, and not the row's own 20.67Lshr", flops_2(colam, 1024, 2.5),
                "0.484", "0.355"),
        crnet: (512, "23.35", f"{caption}896", memory_2(crnet, 896),
                "0.692", f"{power}; r = 896", flops_2(crnet, 896), "0.456", "0.326"),
        full: (0, "70.97", "unexplained: no room for 2Ls^2a, 4.0 GiB; without it, with f = 11,008 "
               "(20.75Lsh) and the 16 MiB of the other rows it comes out", bare,
               "1.608", power, flops_2(full), "1.386", "0.759"),
    }
    for row, (rank, gib, why, again, flops, why_, again_, of_gib, of_flops) in rows.items():
        at = f" at r = {rank}" if rank else ""
        memory, total = memory_2(row, rank), flops_2(row, rank)
        follows = "follows from the printed " * (row != gcp)
        cells += [
            Cell(row, "memory, GiB", f"eq. 9 + activations{at}", memory, gib, why, again),
            Cell(row, "FLOPs", f"16 (step + re-compute){at}", total, f"{flops} x 10^15", why_,
                 10 * again_),
            Cell(row, "memory over GCP's", "", memory / memory_2(gcp), of_gib,
                 follows and f"{follows}memory", again / rows[gcp][3]),
            Cell(row, "FLOPs over GCP's", "", total / flops_2(gcp), of_flops,
                 follows and f"{follows}FLOPs", again_ / rows[gcp][6]),
        ]
    # fmt: on
    notes = (
        "Memory is not of activations alone: 4 x the parameters (eq. 9) are in it; all in bf16.",
        "Step by table 1 at f = 11,008; 20.67 is 62/3 = 10 + 4 f/h and 24 is 8 + 6 f/h at f = 8/3 "
        "h. Recomputed with the caption's r = 512.",
    )
    title = "Table 2: memory and FLOPs with recomputation; 7B, 16 sequences, s = 256, b = 4"
    return Table(title, notes, tuple(cells))


PRINTED_3 = {  # parameters (M) and memory at 60M, 130M, 350M, 1B
    "Full-rank": "58 0.43 134 1.00 368 2.74 1339 9.98",
    **dict.fromkeys(("LoRA", "ReLoRA"), "58 0.37 134 0.86 368 1.94 1339 6.79"),
    **dict.fromkeys(("VeLoRA", "FLoRA"), "58 0.37 134 0.86"),
    "SLTrain": "44 0.32 97 0.72 194 1.45 646 4.81",
    **dict.fromkeys(("CoLA", "LORO"), "43 0.32 94 0.70 185 1.38 609 4.54"),
    "CR-Net, parameters": "43 0.32 90 0.67 183 1.36 583 4.35",
    **dict.fromkeys(("GaLore", "RSO", "Apollo"), "58 0.36 134 0.79 368 1.90 1339 6.60"),
    "CR-Net, memory": "43 0.32 106 0.79 250 1.86 870 6.48",
}
LIKE_LORA, LIKE_GALORE = ("LoRA", "ReLoRA", "VeLoRA", "FLoRA"), ("GaLore", "RSO", "Apollo")
_CUT = "unexplained: cut off instead of rounded would do, or {} instead of {} layers at r = {}"
_MORE = "unexplained: 0.9 M parameters more; r = {} instead of {} would do"
WHY_3 = {  # (row, size): why, and ranks that give the print
    ("CR-Net, parameters", "130M"): (_CUT.format(4, 3, 192), "192x4,224x7"),
    ("CR-Net, parameters", "350M"): (_CUT.format(16, 15, 224), "224x16,256x7"),
    ("CR-Net, parameters", "1B"): (_MORE.format(449, 448), "449"),
    ("CR-Net, memory", "130M"): ("unexplained: r = 310 would do; table 10 averages 239", "310"),
    ("CR-Net, memory", "1B"): (_MORE.format(769, 768), "769"),
}


def parameters_3(row: str, size: str, rank: str = "") -> float:
    """Parameters in M as table 3 counts them: adapters merged; ``rank`` instead of table 10's."""
    if row.startswith("CR-Net"):
        return parameters(size, "crnet", rank or f"aligned-{row.split()[1]}") / 1e6
    if row in ("CoLA", "LORO"):
        return cola(size) / 1e6
    if row == "SLTrain":
        return (cola(size) + SLTRAIN_DENSITY * dense(size)) / 1e6
    return parameters(size) / 1e6


def memory_3(row: str, size: str, rank: str = "") -> float:
    """GiB of weights, gradients and optimizer states in bf16.

    LoRA's: as ``adam_gib``, and the frozen maps. GaLore's: weights and gradients in full, states
    of rank r for the maps; the projector is free.
    """
    if row in LIKE_LORA:
        return (8 * cola(size) + 2 * dense(size)) / GIB
    if row not in LIKE_GALORE:
        return adam_gib(parameters_3(row, size, rank) * 1e6)
    model, items = shape(size), parameters(size)
    states = 4 * model.hidden_size + 3 * model.intermediate_size
    states *= model.num_layers * BASELINE_RANK[size]
    return (4 * items + 4 * (states + items - dense(size))) / GIB


def _table_3() -> Table:
    bytes_ = dict.fromkeys(LIKE_LORA, "8 trained + 2 frozen")
    bytes_ |= dict.fromkeys(LIKE_GALORE, "4 parameters + 4 states")
    low, cells = "L(11hr + 3fr)", []
    formulas = {"SLTrain": f"{low} + 3%", "CoLA": low, "LORO": low}
    for row, line in PRINTED_3.items():
        for at, printed in enumerate(line.split()):
            size, compute = list(PRESET)[at // 2], memory_3 if at % 2 else parameters_3
            value, (why, rank) = compute(row, size), WHY_3.get((row, size), ("", ""))
            formula = formulas.get(row, "eq. 8" if "CR-Net" in row else "L(4h^2 + 3hf)")
            formula = bytes_.get(row, "8 parameters (eq. 9)") if at % 2 else formula
            column = f"{size} memory, GiB" if at % 2 else f"{size} parameters, M"
            wrong = bool(rank) and not reads_as(value, printed)
            reason = (why, compute(row, size, rank)) if wrong else ("", None)
            cells.append(Cell(row, column, formula, value, printed, *reason))
    notes = (
        "Parameters: the formula, norms, embedding and untied head of 32,000 tokens (without the "
        "norms SLTrain's 646 is 645). CR-Net's ranks: table 10; other ranks 128, 256, 256, 512.",
        "LoRA: 8 bytes a trained parameter, 2 a frozen one; ReLoRA, VeLoRA, FLoRA print the same. "
        "GaLore: 4 a parameter, 4 a pair of states, no projector; RSO and Apollo print the same.",
        "Perplexities are measurements and left out; VeLoRA and FLoRA have no 350M and 1B.",
    )
    title = "Table 3: parameters, and memory of weights, gradients and optimizer states"
    return Table(title, notes, tuple(cells))


PRINTED_19 = {  # FLOPs and the ratio to full rank at 350M, 1B, 7B
    "Full-rank": "4.838 x 10^11 (1.000), 2.525 x 10^12 (1.000), 1.005 x 10^13 (1.000)",
    "(Re)LoRA": "8.128 x 10^11 (1.674), 4.226 x 10^12 (1.673), 1.678 x 10^13 (1.670)",
    "SLTrain": "9.482 x 10^11 (1.960), 7.473 x 10^12 (2.959), 4.984 x 10^13 (4.959)",
    "GaLore": "7.934 x 10^11 (1.640), 5.824 x 10^12 (2.306), 3.658 x 10^12 (3.639)",
    "CoLA": "1.934 x 10^11 (0.400), 1.005 x 10^12 (0.398), 0.398 x 10^13 (0.396)",
    "CR-Net": "1.985 x 10^11 (0.410), 0.930 x 10^12 (0.368), 0.369 x 10^13 (0.367)",
}
_32, _6 = "L = 32, table 9 says 24", "6s^2h a layer for attention instead of 12"
WHY_19 = {  # (row, size): why, and what gives the print
    **{(row, "1B"): (_32, {"layers": 32}) for row in PRINTED_19},
    ("GaLore", "7B"): ("exponent misprinted: 10^13, as its ratio has it", None),
    ("CoLA", "350M"): (_6, {"ssh": 6}),
    ("CoLA", "1B"): (f"{_32}; {_6}", {"layers": 32, "ssh": 6}),
    ("CoLA", "7B"): (_6, {"ssh": 6}),
    ("CR-Net", "350M"): ("unexplained: 17 layers at r = 224 would do", {"ranks": "224x17,256x6"}),
    ("CR-Net", "1B"): (f"{_32} (0.959); the rest unexplained, 6s^2h leaves 0.933", None),
    ("CR-Net", "7B"): (_6, {"ssh": 6}),
}


def flops_19(
    row: str, size: str, *, layers: int = 0, ssh: int = 12, ranks: str = "aligned-parameters"
) -> float:
    """FLOPs of a step on 256 tokens by table 1; ``layers`` instead of table 9's, ``ssh`` of
    ``step_flops``, ``ranks`` of CR-Net instead of table 10's."""
    model = replace(shape(size, "crnet", ranks), num_layers=layers or shape(size).num_layers)
    low = [BASELINE_RANK[size]] * model.num_layers
    if row == "CR-Net":
        low = [it.rank for it in linears.slots(model) if it.position == "q"][1:]
    return step_flops(row, model, () if row == "Full-rank" else low, ssh=ssh)


def _table_19() -> Table:
    cells = []
    for row, line in PRINTED_19.items():
        for at, printed in enumerate(line.split(", ")):
            size = ("350M", "1B", "7B")[at]
            flops, ratio = printed.rstrip(")").split(" (")
            value, (why, inputs) = flops_19(row, size), WHY_19.get((row, size), ("", None))
            again = None if inputs is None else flops_19(row, size, **inputs)
            if (row, size) == ("GaLore", "7B"):
                again = value / 10
            cells.append(Cell(row, f"{size} FLOPs", "table 1", value, flops, why, again))
            ours, why, again = value / flops_19("Full-rank", size), "", None
            if not reads_as(ours, ratio):
                why = "follows from the printed FLOPs"
                again = number(flops)[0] / number(PRINTED_19["Full-rank"].split(", ")[at])[0]
            if (row, size) == ("(Re)LoRA", "350M"):
                why, again = "unexplained: the printed FLOPs give 1.680", None
            cells.append(Cell(row, f"{size} over full rank's", "", ours, ratio, why, again))
    note = "Table 1 as printed, s = 256, one sequence. Ranks: table 10; elsewhere 256, 512, 1024."
    return Table("Table 19: FLOPs of a gradient step", (note,), tuple(cells))


PRINTED_22 = {  # FLOPs, computation s, GB, communication s; CR-Net: seconds saved and added
    ("Full-rank", "13B"): "7.48 23.97 1.88 0.029",
    ("CR-Net", "13B"): "3.19 10.23 22.5 0.352 13.74 0.323",
    ("Full-rank", "70B"): "36.67 177.53 21.00 0.328",
    ("CR-Net", "70B"): "14.51 46.51 238.0 3.719 131.02 3.391",
}


def flops_22(row: str, size: str, rank: int = 0, factor: float = 62 / 3) -> float:
    """FLOPs of a step with recomputation, 16 sequences of 4,096 tokens, b = L / 8; ``rank``
    instead of h / 4, ``factor`` of ``again_flops``."""
    model = shape(size)
    layers, rank = model.num_layers, rank or model.hidden_size // 4
    if row == "Full-rank":
        return 16 * 4 / 3 * step_flops(row, model, tokens=4096)
    again = again_flops(model, rank, layers - layers // 8, factor, 4096)
    return 16 * (step_flops(row, model, [rank] * (layers - 1), tokens=4096) + again)


def boundary_gib(row: str, size: str, width: float = 6 + 2 * WIDTH, passes: int = 3) -> float:
    """GiB across the boundaries of a pipeline of 2 (13B), 8 (70B) devices (eq. 48, table 21).

    ``width`` over h: CR-Net sends X and seven Y, 6h + 2f; full rank X alone.
    """
    width = 1 if row == "Full-rank" else width
    boundaries = {"13B": 1, "70B": 7}[size]
    return boundaries * 16 * 4096 * width * shape(size).hidden_size * 2 * passes / GIB


def values_22(row: str, size: str) -> list[float]:
    """The cells of a row of table 22, in the order of ``PRINTED_22``."""
    flops, volume = flops_22(row, size), boundary_gib(row, size)
    values = [flops, flops / A100_FLOPS, volume, volume * 1e9 / PCIE_BYTES]
    if row == "CR-Net":
        full = values_22("Full-rank", size)
        values += [full[1] - values[1], values[3] - full[3]]
    return values


def _table_22() -> Table:
    second, follows = 1e15 / A100_FLOPS, "follows from the printed "
    alike, wide = "unexplained: 18.5 (table 2) for 20.67 would do", "width 12h, f = 3h, for 11.33h"
    low, of_22 = flops_22("CR-Net", "13B", factor=18.5), boundary_gib("CR-Net", "13B", 12)
    # fmt: off
    reasons: dict[tuple[str, str, int], tuple[str, float | None]] = {
        ("Full-rank", "13B", 1): (f"{follows}7.48", 7.48 * second),
        ("CR-Net", "13B", 0): (f"{alike}, and r = 1260 would", low),
        ("CR-Net", "13B", 1): (alike, low / A100_FLOPS),
        ("CR-Net", "13B", 2): (wide, of_22),
        ("CR-Net", "13B", 3): (wide, of_22 * 1e9 / PCIE_BYTES),
        ("CR-Net", "13B", 4): (f"{follows}23.97 and 10.23", 23.97 - 10.23),
        ("CR-Net", "13B", 5): (f"{follows}0.352", 0.352 - 0.029),
        ("Full-rank", "70B", 0): ("unexplained: 0.2% high", None),
        ("Full-rank", "70B", 1): ("digit misprinted: 36.67 x 10^15 / 312 x 10^12 is 117.53", None),
        ("CR-Net", "70B", 0): ("unexplained: 0.8% low", None),
        ("CR-Net", "70B", 1): (f"{follows}14.51", 14.51 * second),
        ("CR-Net", "70B", 4): (f"{follows}177.53; with 117.53 it is 71.02", 177.53 - 46.51),
    }
    columns = (
        ("FLOPs", "step + re-compute"), ("computation, s", "FLOPs / 312 x 10^12"),
        ("communication, GiB", "eq. 48"), ("communication, s", "GiB / 64"),
        ("computation saved, s", "difference"), ("communication added, s", "difference"),
    )
    # fmt: on
    cells = []
    for (row, size), line in PRINTED_22.items():
        for at, (value, printed) in enumerate(zip(values_22(row, size), line.split(), strict=True)):
            printed += "" if at else " x 10^15"
            why = reasons.get((row, size, at), ("", None))
            cells.append(Cell(f"{size} {row}", *columns[at], value, printed, *why))
    notes = (
        "16 sequences of 4,096 tokens, r = h/4, b = L/8. Full rank computes its forward pass "
        "twice; CR-Net: eq. 37 and, again, 20.67(L - b)shr + 4Ls^2h (eq. 39).",
        "Eq. 48: 16 s x width x 2 bytes x 3 passes a boundary, f = 8/3 h.",
    )
    title = "Table 22: computation and communication of a step in a pipeline"
    return Table(title, notes, tuple(cells))


TABLES = {1: _table_1, 2: _table_2, 3: _table_3, 19: _table_19, 22: _table_22}


def table(number: int) -> Table:
    """A table of the paper, recomputed. Raises ``KeyError`` beyond ``TABLES``."""
    return TABLES[number]()


# --- what is no cell of these tables --------------------------------------------------------------

_B = BATCH_TOKENS / 1e9
_CRNET_GIB, _CRNET_FLOPS = memory_2("CR-Net", 896), flops_2("CR-Net", 896)
_SAVED = (36.67e15 - 14.51e15) / A100_FLOPS  # s a step at 70B, by table 22's own FLOPs
_DEVICE = {it: adam_gib(parameters("70B", it)) / 8 for it in ("full", "crnet")}
_ADDED = (boundary_gib("CR-Net", "70B", passes=1) - boundary_gib("Full-rank", "70B", passes=1)) / 7
_LLAMA3 = replace(presets.get("llama3-1b").model, linear="full", vocab_size=VOCAB_SIZE)

# fmt: off
ERRATA = (
    Erratum("E.2.1, batch", "13.1K tokens", "131,072 tokens", "512 x 256", BATCH_TOKENS),
    Erratum("table 3, tokens, 60M", "1.1B", "1.3B", "10K steps; GaLore's are printed", 10e3 * _B),
    Erratum("table 3, tokens, 130M", "2.2B", "2.6B", "20K steps; likewise", 20e3 * _B),
    Erratum("tables 3, 6, 13, tokens, 350M", "6.4B", "7.9B", "60K steps; likewise", 60e3 * _B),
    Erratum("tables 7, 9, tokens, 60K steps", "7.8B", "7.9B", "7.86, cut off", 60e3 * _B),
    Erratum("E.3, tokens", "15.6B", "14.4B", "table 17's last, 110K steps", 110e3 * _B),
    Erratum("E.2.5, tokens, 1B", "15.6B", "13.1B", "table 9's 100K steps", 100e3 * _B),
    Erratum("tables 2, 3, 22, unit", "9.98 GB", "10.71 GB", "it is GiB (table 3, full rank, 1B)",
            8 * parameters("1B") / 1e9),
    Erratum("table 2, memory", "activation memory", "3.73 of 23.35 GiB", "CR-Net's; the rest is "
            "weights, gradients, states", _CRNET_GIB - adam_gib(parameters("7B", "crnet", "896"))),
    Erratum("5.1, F.1, FLOPs saved, 1B", "63.2%", "61.4%", "table 19: L = 32, and less attention",
            100 * (1 - flops_19("CR-Net", "1B") / flops_19("Full-rank", "1B"))),
    Erratum("F.1, FLOPs left, 7B", "36.8%", "37.3%", "table 19 prints 0.367",
            100 * flops_19("CR-Net", "7B") / flops_19("Full-rank", "7B")),
    Erratum("4.2, FLOPs saved against GCP", "67.4%", "67.7%", "24Lsh^2, as table 2 says",
            100 * (1 - _CRNET_FLOPS / flops_2("Vanilla GCP"))),
    Erratum("4.2, FLOPs saved against CoLA-M", "8.0%", "9.5%", "20.67Lshr, as table 2 says",
            100 * (1 - _CRNET_FLOPS / flops_2("CoLA-M", 1024))),
    Erratum("4.1, rank that saves FLOPs", "r < 0.5d", "0.63h", "(24 + 18 f/h) / (66 + 18 f/h)",
            (24 + 18 * WIDTH) / (66 + 18 * WIDTH)),
    Erratum("5.2, low-rank first layer", "3.5%", "3.9%", "table 6", 100 * (19.68 / 18.95 - 1)),
    Erratum("E.2.2, steps to LoRA's perplexity", "29.02%", "26.7%", "table 11: 3.5B of 13.1B; "
            "29.02% is 3.8B", 100 * 3.5 / 13.1),
    Erratum("E.2.2, speed against LoRA", "18.489x", "15.66x", "unexplained; counted as CoLA's "
            "1.326x: 4.226 / 0.930 / 0.2902", 4.226 / 0.930 / 0.2902),
    Erratum("E.2.7, tokens a parameter", "> 22", "21.6", "2.9B by table 3's 134M", 2.9e3 / 134),
    Erratum("table 16, size", "8B", "1.9B", "its shape; the text says 1B",
            sum(linears.num_parameters(_LLAMA3).values()) / 1e9),
    Erratum("table 20, share in [0, 0.2)", "0.05625", "0.05590", "9 of 160; but 23 x 7 = 161",
            9 / (7 * (shape("350M").num_layers - 1))),
    Erratum("table 22, caption, 70B", "127.63 s", "67.63 s", "117.53, not 177.53", _SAVED - 3.391),
    Erratum("G, saved over added time, 70B", "about 30", "20.9", "71.02 / 3.391", _SAVED / 3.391),
    Erratum("G, eq. 48, 70B", "238.0 GB", "255.6 GB", "divided by 2^30, not 10^9; then 3.993 s",
            boundary_gib("CR-Net", "70B") * GIB / 1e9),
    Erratum("G, eq. 48, full rank, 13B", "1.88 GB", "1.25 GB", "3 passes; the footnote has 2",
            boundary_gib("Full-rank", "13B", passes=2)),
    Erratum("G, measured bandwidth", "192.5 GB/s", "172.5 GB/s", "238.0 / 1.380; and 238 holds for "
            "4,096 tokens, the run had 256", 238.0 / 1.380),
    Erratum("G, memory of states saved, 70B", "50%", "59%", "r = h/4",
            100 * (1 - _DEVICE["crnet"] / _DEVICE["full"])),
    Erratum("G, net memory saved a device, 70B", "29.6 GB", "25.5 GB", "unexplained; meant in GiB",
            _DEVICE["full"] - _DEVICE["crnet"] - _ADDED),
    Erratum("5.2, rank selection", "350B", "350M", "E.2.6, table 9"),
    Erratum("table 18", "Qwen-3's perplexities", "unknown", "identical to table 12's, of 13B"),
    Erratum("eq. 1, 13, 31, scale", "sqrt(h)", "sqrt(h / a)", "LLaMA's, of a head"),
    Erratum("eq. 1, product", "(Y^Q)^T Y^K", "Y^Q (Y^K)^T", "the former is h x h; see eq. 13"),
    Erratum("eq. 2, 16, 17", "SwiGLU(gate) * up", "SiLU(gate) * up", "SwiGLU is the whole product"),
    Erratum("eq. 12, 15, 17, 19", "beta", "sign(beta) (|beta| + eps)", "eq. 6"),
    Erratum("eq. 15", "B^O: h x r", "r x h", "A^O B^O would not exist"),
    Erratum("eq. 16 to 27", "input Y^O", "RMSNorm(X + Y^O)", "B.1 omits norms and the residual"),
    Erratum("eq. 22, 26, 27, 29, 34", "DA = X^T DB", "X^T DY B^T", "f x s by r x h"),
    Erratum("eq. 25 to 27", "DY^up (W^up)", "DY^up (W^up)^T", "s x f by h x f"),
    Erratum("eq. 26, 27", "down's from Y^O", "gate's", "down's come from X^down (eq. 22)"),
    Erratum("eq. 30", "Att^h (Y^V)^T", "DAtt^h (Y^V)^T", "a gradient follows from one"),
    Erratum("eq. 46", "sum of squares", "sum of eq. 45", "its left side scales as Y^4"),
    Erratum("B.2, FLOPs of a product", "2mn", "2mnr", "m x n by n x r"),
    Erratum("B.2, down", "s x h by h x r by r x f", "s x f by f x r by r x h", "the same sum"),
    Erratum("eq. 36", "forward-propagation", "backward-propagation", "twice eq. 35"),
    Erratum("algorithm 1", "X A for l = 1 ... L", "for l = 2 ... L", "3.3; 7(L - 1)sr of eq. 38"),
    Erratum("F.2", "large beta: the low-rank part rules", "history rules", "eq. 6; 3.2 is right"),
)
# fmt: on


# --- as text --------------------------------------------------------------------------------------


HEAD = ("row", "column", "formula", "recomputed", "printed", "why")


def _texts(cell: Cell) -> tuple[str, ...]:
    """A row of text; the recomputed figure has a digit more than the print."""
    value = cell.value
    if not isinstance(value, str):
        mantissa, _, power = cell.printed.partition(" x 10^")
        digits = len(mantissa.partition(".")[2]) + 1
        value = f"{value / 10.0 ** int(power or 0):.{digits}f}" + f" x 10^{power}" * bool(power)
    why = "" if cell.agrees else cell.why
    return cell.row, cell.column, cell.formula, value, cell.printed, why


def render(table: Table) -> str:
    """A table as aligned text; why a figure differs stands under the cells, by number."""
    rows = [("", "", *HEAD[2:5], ""), *map(_texts, table.cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    reasons = list(dict.fromkeys(row[-1] for row in rows if row[-1]))
    lines = [table.title, *(line for note in table.notes for line in _wrapped("  ", note))]
    for *texts, why in rows:
        mark = f"[{reasons.index(why) + 1}]" if why else ""
        cells = [f"{text:<{width}}" for text, width in zip(texts, widths, strict=True)]
        lines.append("  ".join([*cells, mark]).rstrip())
    for at, reason in enumerate(reasons, 1):
        lines += _wrapped(f"[{at}] ", reason)
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(label + text, 100, subsequent_indent=" " * len(label))


def markdown() -> str:
    """The page docs/paper_tables.md: every table and the errata."""
    intro = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[1:3]]
    lines = ["<!-- generated by `crnet cost --paper-table all --markdown` -->", ""]
    lines += ["# The paper's tables, recomputed", "", intro[0], "", intro[1], ""]
    for it in map(table, TABLES):
        lines += [f"## {it.title}", "", *(f"- {note}" for note in it.notes), ""]
        lines += _grid([HEAD, *map(_texts, it.cells)])
    lines += ["## Elsewhere in the paper", ""]
    errata = [(it.place, it.printed, it.meant, it.why) for it in ERRATA]
    return "\n".join(lines + _grid([("place", "printed", "meant", "why"), *errata]))


def _grid(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [" | ".join(text.replace("|", "\\|") for text in row) for row in rows]
    return [f"| {line} |" for line in [head, " | ".join("---" for _ in rows[0]), *body]] + [""]
