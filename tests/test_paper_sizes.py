"""The paper's formulas against the package's own closed forms; every equality is exact.

The other tests of ``crnet.paper`` know nothing of the package: what it says of its models is here.
"""

from __future__ import annotations

from crnet.config.model_spec import model_spec
from crnet.cost.flops import block_flops
from crnet.cost.kept import kept_bytes
from crnet.cost.micro_batch import MicroBatch, Precision
from crnet.cost.parameters import num_parameters
from crnet.paper import formulas, sizes
from crnet.recompute.plan import RecomputePlan
from paper_numbers import RANKS, SHAPES, all_parameters


def row(size: str, linear: str, precision: Precision = "fp32") -> MicroBatch:
    """One sequence of 256 tokens."""
    return MicroBatch(model_spec(sizes.model_config(size, linear)), 1, 256, precision)


def test_shapes_are_the_paper_s():
    found = {size: sizes.sizes_of(size) for size in SHAPES}
    assert {
        size: (each.num_layers, each.hidden_size, each.intermediate_size)
        for size, each in found.items()
    } == SHAPES
    assert sizes.sizes_of("1B", num_layers=32).num_layers == 32


def test_parameters_are_the_paper_s():
    assert {size: sizes.num_parameters(size) for size in SHAPES} == {
        size: all_parameters(size) for size in SHAPES
    }
    for (size, aligned), ranks in RANKS.items():
        rank = f"aligned-{aligned}"
        assert sizes.num_parameters(size, "crnet", rank) == all_parameters(size, ranks)
        assert sizes.crnet_ranks(size, rank) == ranks


def test_maps_are_the_paper_s():
    for size, (layers, h, f) in SHAPES.items():
        spec = model_spec(sizes.model_config(size))
        counts = num_parameters(spec)
        assert formulas.map_items(size) == sum(counts[each.name] for each in spec.positions)
        # Eq. 8; the feed-forward is of three maps: erratum of eq. 2.
        assert counts["gate"] + counts["up"] + counts["down"] == layers * 3 * h * f


def test_flops_of_a_step_are_cost_s():
    """Eq. 10 against the closed form that torch's counter confirms."""
    for name, linear, ranks in (
        ("Full-rank", "full", []),
        ("CR-Net", "crnet", RANKS["350M", "parameters"]),
    ):
        flops = block_flops(row("350M", linear), RecomputePlan())
        ours = formulas.step_flops(name, sizes.sizes_of("350M"), ranks)
        assert flops["forward"] + flops["backward"] == ours


def test_eq_38_is_what_cost_says_is_kept():
    """Stream, outputs and bottlenecks of ``invert`` in bf16, the last layer in A."""
    terms = kept_bytes(row("1B", "crnet", "bf16"), RecomputePlan("invert", (8, 16, 24)), {})
    kept = sum(terms[name] for name in ("stream", "outputs", "bottlenecks"))
    assert kept == 2 * formulas.kept_items(sizes.sizes_of("1B"), 448, 3)


def test_the_first_layer_keeps_no_bottleneck():
    """Erratum of algorithm 1."""
    terms = kept_bytes(row("7B", "crnet", "bf16"), RecomputePlan("invert", (8, 16, 24, 32)), {})
    assert terms["bottlenecks"] == 2 * 7 * 31 * 256 * 896


def test_eq_39_is_what_cost_says_is_repeated():
    """With 10 + 4 f/h for 20.67."""
    flops = block_flops(row("7B", "crnet"), RecomputePlan("invert", (8, 16, 24, 32)))
    factor = 10 + 4 * 11008 / 4096
    assert flops["recompute"] == formulas.recompute_flops(sizes.sizes_of("7B"), 896, 28, factor)
