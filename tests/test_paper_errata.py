"""The paper's disagreements with itself: each from numbers alone, or from what an equation says.

Numbers: equality is that of the printed digits (``reads_as``). Equations: what is said there cannot
be (shapes that do not conform) or is not what differences of the function give (1e-6, their error).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from crnet.paper.cells import reads_as
from crnet.paper.errata import ERRATA, Erratum
from crnet.paper.formulas import kept_items
from crnet.paper.sizes import sizes_of
from crnet.recompute.plan import invert_error
from paper_numbers import GIB, SHAPES, all_parameters, full, low

TOKENS = 512 * 256 / 1e9
LLAMA3 = 32 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 7168) + 2 * 32_000 * 2048
STATES_70B = [8 * all_parameters("70B", ranks) / 8 / GIB for ranks in (None, [2048] * 79)]
STEP_1B = [24 * full(256, 2048, 5461), full(256, 2048, 5461) + 23 * low(256, 2048, 5461, 448)]
STEP_7B = [32 * full(256, 4096, 11008), full(256, 4096, 11008) + 31 * low(256, 4096, 11008, 896)]
VALUES = {  # the same from numbers alone
    "E.2.1, batch": 512 * 256,
    "tables 7, 9, tokens, 60K steps": 60_000 * TOKENS,
    "tables 2, 3, 22, unit": 8 * all_parameters("1B") / 1e9,
    "table 2, memory": 16 * 256 * 2 * (72 * 4096 + 7 * 31 * 896) / GIB,
    "5.1, F.1, FLOPs saved, 1B": 100 * (1 - STEP_1B[1] / STEP_1B[0]),
    "F.1, FLOPs left, 7B": 100 * STEP_7B[1] / STEP_7B[0],
    "4.2, FLOPs saved against GCP": 100 * (1 - 0.69171 / 2.1413),
    "4.2, FLOPs saved against CoLA-M": 100 * (1 - 0.69171 / 0.76439),
    "5.2, low-rank first layer": 100 * (19.68 - 18.95) / 18.95,
    "E.2.2, steps to LoRA's perplexity": 100 * 3.5 / 13.1,
    "E.2.2, speed against LoRA": 1.005 / 0.930 / 0.8152 * (4.226 / 1.005) * (0.8152 / 0.2902),
    "table 16, size": LLAMA3 / 1e9,
    "table 20, share in [0, 0.2)": 9 / 161,
    "table 22, caption, 70B": 117.53 - 46.51 - 3.391,
    "G, saved over added time, 70B": (117.53 - 46.51) / 3.391,
    "G, eq. 48, 70B": 238 * GIB / 1e9,
    "G, eq. 48, full rank, 13B": 16 * 4096 * 5120 * 2 * 2 / GIB,
    "G, memory of states saved, 70B": 100 * (1 - STATES_70B[1] / STATES_70B[0]),
    "G, net memory saved a device, 70B": STATES_70B[0]
    - STATES_70B[1]
    - 16 * 4096 * 8192 * 2 * (34 / 3 - 1) / GIB,
}
BY_PLACE = {erratum.place: erratum for erratum in ERRATA}


def complaints(erratum: Erratum) -> list[str]:
    """What is wrong with an erratum's number, ours and the one from numbers alone."""
    expected, found = VALUES[erratum.place], []
    for value in (erratum.value, expected):
        if value is None or not reads_as(value, erratum.meant):
            found.append(f"{value} is not {erratum.meant}")
    if any(each.isdigit() for each in erratum.printed) and reads_as(expected, erratum.printed):
        found.append(f"{expected} reads as printed, {erratum.printed}")
    return [f"{erratum.place}: {each}" for each in found]


def test_numbers_of_the_errata():
    wrong = [
        each for erratum in ERRATA if erratum.value is not None for each in complaints(erratum)
    ]
    assert not wrong, "\n".join(wrong)


def test_figures_that_errata_lean_on():
    assert reads_as(1.005 / 0.930 / 0.8152, "1.326")  # E.2.2's other speed, counted as ours
    assert reads_as(0.2902 * 13.1, "3.8")
    assert reads_as(255.55 / 64, "3.993")
    assert [0.05625 * 160, 0.2625 * 160, 0.55 * 160, 0.13125 * 160] == [9, 42, 88, 21]
    assert reads_as(100 * (1 - 0.692 / 2.119), "67")  # of the printed figures
    assert reads_as(100 * (1 - 0.930 / 2.525), "63.2")
    assert 13.74 / 0.323 > 30  # G's claim holds at 13B


def test_what_has_a_reading_is_no_erratum():
    """Printed figures that look wrong and are not."""
    assert reads_as(119_000 * TOKENS, "15.6")  # E.2.5, E.3: a schedule longer than table 17's 110K
    assert not {"E.2.5, tokens, 1B", "E.3, tokens"} & {*BY_PLACE}
    # E.2.7: more than 22 tokens for each parameter that CR-Net trains, at every size of table 15.
    for size, ranks, tokens in (("130M", 224, 2.9e9), ("350M", 256, 8e9), ("1B", 448, 29.5e9)):
        layers = SHAPES[size][0] - 1
        assert tokens / all_parameters(size, [ranks] * layers) > 22
    # 4.1: below 0.5d low rank has fewer FLOPs; that it has up to 0.63d makes that no less true.
    assert low(256, 4096, 11008, 2048) < full(256, 4096, 11008)
    assert not {"4.1, rank that saves FLOPs", "E.2.7, tokens a parameter"} & {*BY_PLACE}


def numeric_gradient(function, x, step=1e-5):
    slopes = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        there = x.copy()
        there[at] += step
        back = x.copy()
        back[at] -= step
        slopes[at] = (function(there) - function(back)) / (2 * step)
    return slopes


def drawn(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


def conform(*shapes):
    return all(a[1] == b[0] for a, b in itertools.pairwise(shapes))


S, H, F, R = 5, 4, 6, 2


def table_3_leaves_padding_out():
    """Of 60M and 130M the same share twice, to the printed digits; of 1B everything."""
    printed = {"60M": (1.1, 10_000), "130M": (2.2, 20_000), "350M": (6.4, 60_000)}
    for size, (billions, steps) in printed.items():
        share = 0.814 if size == "350M" else 0.8391
        assert reads_as(share * steps * TOKENS, str(billions))
        assert not reads_as(steps * TOKENS, str(billions))
    assert reads_as(100_000 * TOKENS, "13.1")


def no_volume_has_the_bandwidth():
    moved = 192.5 * 1.380
    whole = 238 * GIB / 1e9
    assert reads_as(moved, "265.7")
    assert reads_as(whole, "255.6")
    assert reads_as(whole * 256 / 4096, "16.0")
    assert all(abs(volume / moved - 1) > 0.03 for volume in (whole, 238.0, whole / 16))


def the_bound_of_the_rebuilding_error_passes_1():
    """Seven layers crossed, between two kept ones of every 8; bf16 rounds by 2^-8 at most."""
    assert invert_error([0.5] * 7, 2.0**-8)[-1] > 1


def a_hundred_steps_are_fewer():
    warmup, every, steps = 1000, 500, 100
    assert steps < min(warmup, every)


def kept_layers_need_no_product():
    layers, kept = range(1, 9), {4, 8}
    rebuilt = {layer for layer in layers if layer not in kept}
    printed = {layer for layer in layers if layer + 1 not in kept}
    assert len(rebuilt) == len(layers) - len(kept)
    assert printed & kept
    assert rebuilt - printed == {3, 7}


def gate_and_up_rebuild_f():
    assert 2 * (2 * S * R * F) == 4 * S * F * R
    assert conform((S, R), (R, F))


def r0_does_not_reach_the_ranks():
    """At r = r0 the proof's beta is 0 and both sides are equal. White noise has a stable rank of
    a quarter of its size, and (1 - eps)^2 < 1."""
    size = 400
    noise = np.random.default_rng(0).normal(size=(size, size))
    stable = (noise**2).sum() / np.linalg.norm(noise, 2) ** 2
    assert stable / size == pytest.approx(0.25, abs=0.01)
    eps, r = 0.4, (1 - 0.4) ** 2 * stable
    assert (1 - eps) * stable**0.5 - r**0.5 == pytest.approx(0, abs=1e-12)
    assert r < 0.25 * size


def size_is_350m():
    assert max(all_parameters(size) for size in SHAPES) < 350e9
    assert reads_as(all_parameters("350M") / 1e6, "368")


def table_18_is_table_12():
    table_12 = {"full": "24.31 20.53 18.84 17.85", "CR-Net": "25.99 21.73 19.32 18.12"}
    table_18 = {"full": "24.31 20.53 18.84 17.85", "CR-Net": "25.99 21.73 19.32 18.12"}
    assert table_12 == table_18


def scores_have_the_head_size_s_scale():
    q, k = np.random.default_rng(0).normal(size=(2, 20_000, 64))  # a head of 64 in h = 512
    assert np.std((q * k).sum(1)) == pytest.approx(64**0.5, rel=0.05)
    assert sizes_of("60M").hidden_size // sizes_of("60M").num_heads == 64


def scores_are_tokens_by_tokens():
    assert not conform((H, S), (S, H), (S, H))
    assert conform((S, H), (H, S), (S, H))


def swiglu_is_the_whole_product():
    gate, up = drawn(2, S, F)
    silu = gate / (1 + np.exp(-gate))
    swiglu = silu * up
    assert not np.allclose(swiglu * up, silu * up)


def eps_is_in_the_gain():
    beta = -0.25
    assert np.sign(beta) * (abs(beta) + 1e-6) == pytest.approx(beta - 1e-6, abs=1e-12)


def b_o_is_r_by_h():
    assert not conform((S, H), (H, R), (H, R))
    assert conform((S, H), (H, R), (R, H))


def feed_forward_reads_the_stream():
    x, y_o = drawn(2, S, H)
    att = y_o + x  # eq. 1; eq. 2 reads it
    assert not np.allclose(att, y_o)


def weights_are_transposed():
    assert not conform((S, F), (H, F))
    assert conform((S, F), (F, H))


def gradient_of_a():
    """Of sum(D * (X A B)) with respect to A and B; eq. 22 where X is the input of down."""
    x, a, b, slope = drawn(S, F), drawn(F, R), drawn(R, H), drawn(S, H)
    found = numeric_gradient(lambda moved: (slope * (x @ moved @ b)).sum(), a)
    np.testing.assert_allclose(found, x.T @ (slope @ b.T), rtol=1e-6, atol=1e-6)
    found = numeric_gradient(lambda moved: (slope * (x @ a @ moved)).sum(), b)
    np.testing.assert_allclose(found, (x @ a).T @ slope, rtol=1e-6, atol=1e-6)
    assert not conform((F, S), (R, H))


def down_s_gradient_is_of_its_own_input():
    assert (H, R) != (F, R)  # (Y^O)^T ... is h wide, A^down f
    gradient_of_a()


def gradient_of_the_weights_of_attention():
    """Eq. 30: of sum(D * (P V)) with respect to P."""
    weights, (v, slope) = drawn(S, S), drawn(2, S, H)
    found = numeric_gradient(lambda moved: (slope * (moved @ v)).sum(), weights)
    np.testing.assert_allclose(found, slope @ v.T, rtol=1e-6, atol=1e-6)
    assert not np.allclose(found, (weights @ v) @ v.T)


def eq_46_has_no_square():
    sigma, delta = np.array([3.0, 2.0]), np.array([1.0, 0.5])

    def left(scale, power):
        return (((scale * sigma) ** 2 - (scale * delta) ** 2) ** power).sum()

    assert left(2, 2) == 16 * left(1, 2)  # of Y^4
    assert left(2, 1) == 4 * left(1, 1)  # of Y^2, as beta ||Y|| (2 sqrt(r) ||Y|| + beta r ||Y||)


def a_product_takes_2mnr():
    s, h = 7, 11
    assert 3 * 2 * s * h * h == 6 * s * h**2  # B.2's own "Q, K, V: 6 s h^2"
    assert 3 * 2 * s * h != 6 * s * h**2


def down_reads_f():
    assert 2 * (S * H * R) + 2 * (S * R * F) == 2 * (S * F * R) + 2 * (S * R * H)
    assert conform((S, F), (F, R), (R, H))
    assert not conform((S, F), (H, R), (R, F))


def backward_is_twice_forward():
    forward, backward, both = (8, 4, 6), (16, 8, 12), (24, 12, 18)  # eq. 35, 36, 37
    assert tuple(2 * factor for factor in forward) == backward
    assert tuple(map(sum, zip(forward, backward, strict=True))) == both


def the_first_layer_keeps_no_bottleneck():
    """Also by the package's own account: test_paper_sizes."""
    sizes = sizes_of("7B")
    assert kept_items(sizes, 897, 4) - kept_items(sizes, 896, 4) == 7 * 31 * 256


def history_grows_with_beta():
    """Eq. 6: the nearer the output is to the history, the larger beta; at 0 it is all update."""
    below, update = drawn(2, 40, 50)

    def alike(beta, part):
        return np.corrcoef((beta * below + update).ravel(), part.ravel())[0, 1]

    assert alike(0.0, update) == pytest.approx(1)
    history = [alike(beta, below) for beta in (0.0, 0.5, 2.0, 5.0)]
    assert history == sorted(history)
    assert history[-1] > 0.95 > alike(5.0, update)


CHECKS = {
    "tables 3, 9, tokens": table_3_leaves_padding_out,
    "G, measured bandwidth": no_volume_has_the_bandwidth,
    "3.3, rebuilding error": the_bound_of_the_rebuilding_error_passes_1,
    "table 8, Qwen-3": a_hundred_steps_are_fewer,
    "C.1.2, what is rebuilt": kept_layers_need_no_product,
    "C.1.2, gate and up": gate_and_up_rebuild_f,
    "theorem 1": r0_does_not_reach_the_ranks,
    "5.2, rank selection": size_is_350m,
    "table 18": table_18_is_table_12,
    "eq. 1, 13, 31, scale": scores_have_the_head_size_s_scale,
    "eq. 1, product": scores_are_tokens_by_tokens,
    "eq. 2, 16, 17": swiglu_is_the_whole_product,
    "eq. 12, 15, 17, 19": eps_is_in_the_gain,
    "eq. 15": b_o_is_r_by_h,
    "eq. 16 to 27": feed_forward_reads_the_stream,
    "eq. 22, 26, 27, 29, 34": gradient_of_a,
    "eq. 25 to 27": weights_are_transposed,
    "eq. 26, 27": down_s_gradient_is_of_its_own_input,
    "eq. 30": gradient_of_the_weights_of_attention,
    "eq. 46": eq_46_has_no_square,
    "B.2, FLOPs of a product": a_product_takes_2mnr,
    "B.2, down": down_reads_f,
    "eq. 36": backward_is_twice_forward,
    "algorithm 1": the_first_layer_keeps_no_bottleneck,
    "F.2, large beta": history_grows_with_beta,
}
QUOTED = {  # what the paper says there, and what contradicts it
    "abstract": (
        "across model scales from 60M to 7B parameters",
        "with size varying from 60M to 13B",
    ),
    "F.2, figures of learnable beta": (
        "As evidenced by Figure 5 and 6, dynamic",
        "Figure 6: The evaluation perplexity for *CR-Net*, Learnable-ResFormer and DenseFormer",
        "Figure 9: The Comparison of evaluation perplexity for *CR-Net* in pre-training tasks with",
    ),
}
PAPER = Path(os.environ.get("CRNET_SHARED", "")) / "paper" / "cr-net-paper.md"


@pytest.fixture
def paper() -> str:
    if not PAPER.is_file():
        pytest.skip("CRNET_SHARED names no folder with the paper's text")
    return PAPER.read_text()


@pytest.mark.parametrize("place", QUOTED)
def test_what_errata_quote_is_printed(place: str, paper: str):
    assert [quote for quote in QUOTED[place] if quote not in paper] == []


def test_section_5_2_has_no_error_of_rebuilding(paper: str):
    """3.3 sends the reader there."""
    assert "see empirical validation in Section 5.2" in paper
    section = paper.partition("## 5.2 ABLATIONS")[2].partition("## 6 CONCLUSION")[0]
    assert "beta" in section
    assert not any(word in section.lower() for word in ("recover", "comput", "rebuil", "error"))


def test_errata_without_a_number():
    wrong = []
    for place, check in CHECKS.items():
        try:
            check()
        except AssertionError as error:
            wrong.append(f"{place}: {error}")
    assert not wrong, "\n".join(wrong)


def test_no_erratum_is_untested():
    assert {*VALUES} == {erratum.place for erratum in ERRATA if erratum.value is not None}
    wordy = {erratum.place for erratum in ERRATA if erratum.value is None}
    assert {*CHECKS} | {*QUOTED} == wordy
    assert not {*CHECKS} & {*QUOTED}
    assert len(BY_PLACE) == len(ERRATA)
