"""The paper's closed forms: FLOPs, parameters, memory and volume, as its tables need them.

Source: arXiv:2509.18993. Symbols: L blocks, h hidden size, f feed-forward width, a heads, r rank,
s tokens of a sequence, b kept layers (the paper's |A|). FLOPs are of products only, 2 an item.
``size`` is a key of ``sizes.PRESETS``; rows are called as the paper calls them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from crnet.config.units import GIB
from crnet.paper.sizes import Sizes, crnet_ranks, num_parameters, sizes_of, state_bytes

A100_FLOPS, PCIE_BYTES = 312e12, 64e9  # a second, appendix G
FF_RATIO = 8 / 3
"""f / h where the paper writes a number for it (C.2, G)."""
BASELINE_RANK = {"60M": 128, "130M": 256, "350M": 256, "1B": 512, "7B": 1024}
"""Of LoRA, SLTrain, GaLore, CoLA (arXiv:2403.03507): they give CoLA's counts in table 3."""
SLTRAIN_DENSITY = 0.03
"""Of the sparse part, indices free (arXiv:2406.02214): it gives SLTrain's counts in table 3."""
LIKE_LORA, LIKE_GALORE = ("LoRA", "ReLoRA", "VeLoRA", "FLoRA"), ("GaLore", "RSO", "Apollo")
"""Rows of table 3 that print the same memory as the first of them."""

# --- FLOPs of a step: table 1 ---------------------------------------------------------------------

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


def count_terms(method: str) -> dict[str, int]:
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


def format_terms(terms: Terms) -> str:
    """``24sh^2 + 12s^2h + 18shf``."""
    order = ["shh", "shr", "ssh", "shf", "sfr", "hhr", "hfr"]
    names = sorted(terms, key=order.index)
    return " + ".join(f"{terms[name]}" + re.sub(r"(.)\1", r"\1^2", name) for name in names)


def step_flops(
    method: str,
    sizes: Sizes,
    ranks: Sequence[int] = (),
    tokens: int = 256,
    attention_factor: int = 12,
) -> float:
    """FLOPs of a step on one sequence by table 1 (CR-Net: eq. 10).

    Args:
        method: a row of ``TABLE_1``.
        sizes: L, h and f.
        ranks: of the low-rank layers, bottom first; none for full rank.
        tokens: s.
        attention_factor: instead of the 12 of attention's 12 s^2 h.
    """

    def layer_flops(terms: Terms, rank: int) -> float:
        value_of = {"s": tokens, "h": sizes.hidden_size, "f": sizes.intermediate_size, "r": rank}
        terms = {**terms, "ssh": terms["ssh"] * attention_factor // 12}
        return sum(
            factor * math.prod(value_of[symbol] for symbol in term)
            for term, factor in terms.items()
        )

    first = [layer_flops(FULL, 0)] if method == "CR-Net" else []
    return sum(
        first + [layer_flops(TABLE_1[method], rank) for rank in ranks or [0] * sizes.num_layers]
    )


def recompute_flops(
    sizes: Sizes, rank: int, num_rebuilt: int, factor: float = 62 / 3, tokens: int = 256
) -> float:
    """FLOPs of recomputation on one sequence, 20.67 n s h r + 4 L s^2 h, 20.67 being 10 + 4 f/h.

    ``num_rebuilt`` is n: L - b for CR-Net (eq. 39), L for CoLA-M (eq. 41). Vanilla GCP's is n = L,
    r = h and 24, that is 8 + 6 f/h.
    """
    h = sizes.hidden_size
    return factor * num_rebuilt * tokens * h * rank + 4 * sizes.num_layers * tokens**2 * h


def recompute_flops_of_cola_m(sizes: Sizes, rank: int, tokens: int = 256) -> float:
    """FLOPs of CoLA-M's recomputation on one sequence, 10 L s h r + 4 L s f r + 4 L s^2 h (eq. 40;
    eq. 41 is the same at f = 8/3 h)."""
    factor = 10 + 4 * sizes.intermediate_size / sizes.hidden_size
    return recompute_flops(sizes, rank, sizes.num_layers, factor, tokens)


def kept_items_of_cola_m(sizes: Sizes, rank: int, tokens: int = 256) -> int:
    """Items CoLA-M keeps of a sequence, 2 L s h + 7 L s r (table 2)."""
    return tokens * sizes.num_layers * (2 * sizes.hidden_size + 7 * rank)


# --- parameters and memory ------------------------------------------------------------------------


def map_items(size: str) -> int:
    """Items of the full-rank maps of all layers, L (4 h^2 + 3 h f)."""
    sizes = sizes_of(size)
    h, f = sizes.hidden_size, sizes.intermediate_size
    return sizes.num_layers * (4 * h * h + 3 * h * f)


def cola_parameters(size: str, rank: int | None = None) -> int:
    """CoLA's and LORO's parameters: every layer low rank, L (11 h r + 3 f r) and the rest."""
    return num_parameters(size, "lowrank", str(rank or BASELINE_RANK[size]))


def adam_gib(items: float) -> float:
    """GiB of weights, gradients and two states in bf16: 4 x the parameters (eq. 9)."""
    return 8 * items / GIB


def kept_items(sizes: Sizes, rank: int, num_kept: int, tokens: int = 256) -> int:
    """Items algorithm 1 keeps of a sequence, (L + 5b) s h + 2b s f + 7 (L - 1) s r (eq. 38)."""
    h, f, layers = sizes.hidden_size, sizes.intermediate_size, sizes.num_layers
    return tokens * ((layers + 5 * num_kept) * h + 2 * num_kept * f + 7 * (layers - 1) * rank)


# --- table 2: recomputation at 7B -----------------------------------------------------------------


def memory_of_table_2(method: str, rank: int = 0) -> float:
    """GiB at 7B: ``adam_gib`` and 16 sequences of 256 tokens' activations, in bf16."""
    sizes, items = sizes_of("7B"), num_parameters("7B")
    layers, h = sizes.num_layers, sizes.hidden_size
    if method == "Vanilla GCP":
        widths = layers * h
    elif method == "CoLA-M":
        items, widths = cola_parameters("7B", rank), kept_items_of_cola_m(sizes, rank, tokens=1)
    elif method == "CR-Net":
        items = num_parameters("7B", "crnet", str(rank))
        widths = (layers + 10 * 4) * h + 7 * (layers - 1) * rank
    else:
        widths = layers * ((10 + 4 * FF_RATIO) * h + 2 * 256 * sizes.num_heads)
    return adam_gib(items) + 2 * 16 * 256 * widths / GIB


def flops_of_table_2(method: str, rank: int = 0, factor: float | None = None) -> float:
    """FLOPs at 7B, 16 sequences of 256 tokens: the step and what is computed again.

    ``factor`` is that of ``recompute_flops``; without it the row's own, at f = 8/3 h.
    """
    sizes = sizes_of("7B")
    layers, h = sizes.num_layers, sizes.hidden_size
    if method == "Full-rank":
        return 16 * step_flops(method, sizes)
    own_factor = {"Vanilla GCP": 8 + 6 * FF_RATIO, "CoLA-M": 10 + 4 * FF_RATIO, "CR-Net": 62 / 3}
    factor = factor or own_factor[method]
    if method == "Vanilla GCP":
        return 16 * (step_flops("Full-rank", sizes) + recompute_flops(sizes, h, layers, factor))
    if method == "CoLA-M":
        step, num_rebuilt = step_flops("CoLA", sizes, [rank] * layers), layers
    else:
        step, num_rebuilt = step_flops(method, sizes, [rank] * (layers - 1)), layers - 4
    return 16 * (step + recompute_flops(sizes, rank, num_rebuilt, factor))


# --- table 3: parameters and memory of the methods ------------------------------------------------


def parameters_of_table_3(row: str, size: str, rank: str = "") -> float:
    """Parameters in M as table 3 counts them: adapters merged; ``rank`` instead of table 10's."""
    if row.startswith("CR-Net"):
        return num_parameters(size, "crnet", rank or f"aligned-{row.split()[1]}") / 1e6
    if row in ("CoLA", "LORO"):
        return cola_parameters(size) / 1e6
    if row == "SLTrain":
        return (cola_parameters(size) + SLTRAIN_DENSITY * map_items(size)) / 1e6
    return num_parameters(size) / 1e6


def memory_of_table_3(row: str, size: str, rank: str = "") -> float:
    """GiB of weights, gradients and optimizer states in bf16.

    LoRA's: as ``adam_gib``, and the frozen maps. GaLore's: weights and gradients in full, states
    of rank r for the maps; the projector is free.
    """
    if row in LIKE_LORA:
        return (8 * cola_parameters(size) + 2 * map_items(size)) / GIB
    if row not in LIKE_GALORE:
        return adam_gib(parameters_of_table_3(row, size, rank) * 1e6)
    sizes, items = sizes_of(size), num_parameters(size)
    states = 4 * sizes.hidden_size + 3 * sizes.intermediate_size
    states *= sizes.num_layers * BASELINE_RANK[size]
    return (4 * items + 4 * (states + items - map_items(size))) / GIB


# --- table 4: 7B, parameters, gradients and states ------------------------------------------------

RANKS_10 = "aligned-parameters"
"""Table 10's ranks; full rank has none."""
TABLE_4: dict[str, tuple[str, str, str, dict[str, int]]] = {
    # row: parameterization, its ranks, optimizer, its options; the paper prints none of them here
    "8-bit Adam": ("full", RANKS_10, "adam8bit", {}),
    "8-bit GaLore": ("full", RANKS_10, "galore8bit", {"rank": BASELINE_RANK["7B"]}),
    "Apollo": ("full", RANKS_10, "apollo", {"rank": 256}),
    "CoLA-M": ("cola", str(BASELINE_RANK["7B"]), "adamw", {}),
    "CR-Net": ("crnet", RANKS_10, "adamw", {}),
}


def state_gib_of_table_4(row: str) -> float:
    """GiB of the optimizer's state: moments of a byte with maxima of blocks of 256 items or, of
    embedding, head and norms, in bf16; Adam's and projectors in bf16."""
    linear, rank, optimizer, options = TABLE_4[row]
    return state_bytes("7B", linear, rank, optimizer, options) / GIB


def weights_gib_of_table_4(row: str) -> float:
    """GiB of the weights in bf16; gradients take as many."""
    linear, rank, *_ = TABLE_4[row]
    return 2 * num_parameters("7B", linear, rank) / GIB


def memory_of_table_4(row: str) -> float:
    """GiB of weights, gradients and the optimizer's state; no activations."""
    return 2 * weights_gib_of_table_4(row) + state_gib_of_table_4(row)


# --- table 19: FLOPs of the methods ---------------------------------------------------------------


def flops_of_table_19(
    row: str,
    size: str,
    *,
    num_layers: int = 0,
    attention_factor: int = 12,
    rank: str = "aligned-parameters",
) -> float:
    """FLOPs of a step on 256 tokens by table 1.

    ``num_layers`` instead of table 9's, ``attention_factor`` of ``step_flops``, ``rank`` of CR-Net
    instead of table 10's.
    """
    sizes = sizes_of(size, num_layers)
    if row == "Full-rank":
        ranks = []
    elif row == "CR-Net":
        ranks = crnet_ranks(size, rank, num_layers)
    else:
        ranks = [BASELINE_RANK[size]] * sizes.num_layers
    return step_flops(row, sizes, ranks, attention_factor=attention_factor)


# --- table 22: a pipeline -------------------------------------------------------------------------


def flops_of_table_22(row: str, size: str, rank: int = 0, factor: float = 62 / 3) -> float:
    """FLOPs of a step with recomputation, 16 sequences of 4,096 tokens, b = L / 8.

    ``rank`` instead of h / 4, ``factor`` of ``recompute_flops``.
    """
    sizes = sizes_of(size)
    layers, rank = sizes.num_layers, rank or sizes.hidden_size // 4
    if row == "Full-rank":
        return 16 * 4 / 3 * step_flops(row, sizes, tokens=4096)
    recomputed = recompute_flops(sizes, rank, layers - layers // 8, factor, 4096)
    return 16 * (step_flops(row, sizes, [rank] * (layers - 1), tokens=4096) + recomputed)


def boundary_gib(
    row: str, size: str, width: float = 6 + 2 * FF_RATIO, num_passes: int = 3
) -> float:
    """GiB across the boundaries of a pipeline of 2 (13B), 8 (70B) devices (eq. 48, table 21).

    ``width`` in h: CR-Net sends X and seven Y, 6h + 2f; full rank X alone.
    """
    width = 1 if row == "Full-rank" else width
    num_boundaries = {"13B": 1, "70B": 7}[size]
    return num_boundaries * 16 * 4096 * width * sizes_of(size).hidden_size * 2 * num_passes / GIB


def values_of_table_22(row: str, size: str) -> list[float]:
    """A row's FLOPs, seconds of computation, GiB, seconds of communication.

    CR-Net's also: the seconds of computation saved and of communication added.
    """
    flops, volume = flops_of_table_22(row, size), boundary_gib(row, size)
    values = [flops, flops / A100_FLOPS, volume, volume * 1e9 / PCIE_BYTES]
    if row == "CR-Net":
        full = values_of_table_22("Full-rank", size)
        values += [full[1] - values[1], values[3] - full[3]]
    return values
