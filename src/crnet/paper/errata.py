"""The paper's disagreements with itself that are no cell of the recomputed tables."""

from __future__ import annotations

from dataclasses import dataclass

from crnet.paper.formulas import (
    A100_FLOPS,
    GIB,
    adam_gib,
    boundary_gib,
    flops_of_table_2,
    flops_of_table_19,
    memory_of_table_2,
)
from crnet.paper.sizes import num_parameters, sizes_of


@dataclass(frozen=True)
class Erratum:
    """A disagreement inside the paper that is not a cell of the five tables.

    What has a reading is none: 15.6B tokens (E.2.5, E.3) are 119,000 steps, of which table 17
    prints some; r < 0.5d (4.1) is enough and need not be necessary; "more than 22" tokens a
    parameter (E.2.7) holds of the parameters that are trained.
    """

    place: str
    printed: str
    meant: str
    why: str = ""
    value: float | None = None
    """The first number of ``meant``, recomputed; None where no number is at stake."""


BATCH_TOKENS = 512 * 256  # E.2.1
_B = BATCH_TOKENS / 1e9  # billions of tokens a step
_CRNET_GIB, _CRNET_FLOPS = memory_of_table_2("CR-Net", 896), flops_of_table_2("CR-Net", 896)
_SAVED_S = (36.67e15 - 14.51e15) / A100_FLOPS  # a step at 70B, by table 22's own FLOPs
_FULL_DEVICE_GIB, _CRNET_DEVICE_GIB = (  # of states, one of 8 devices
    adam_gib(num_parameters("70B", linear)) / 8 for linear in ("full", "crnet")
)
_ADDED_GIB = (  # at a boundary, one pass
    boundary_gib("CR-Net", "70B", num_passes=1) - boundary_gib("Full-rank", "70B", num_passes=1)
) / 7

# fmt: off
ERRATA = (
    Erratum("E.2.1, batch", "13.1K tokens", "131,072 tokens", "512 x 256", BATCH_TOKENS),
    Erratum("tables 3, 9, tokens", "1.1B and 1.3B at 60M", "one of two counts", "table 3's of 60M, "
            "130M, 350M are 84, 84, 81% of 512 x 256 a step: padding is left out; its 1B and table "
            "9 count it"),
    Erratum("tables 7, 9, tokens, 60K steps", "7.8B", "7.9B", "7.86, cut off", 60e3 * _B),
    Erratum("tables 2, 3, 22, unit", "9.98 GB", "10.71 GB", "it is GiB (table 3, full rank, 1B)",
            8 * num_parameters("1B") / 1e9),
    Erratum("table 2, memory", "activation memory", "3.73 of 23.35 GiB", "CR-Net's; the rest is "
            "weights, gradients, states",
            _CRNET_GIB - adam_gib(num_parameters("7B", "crnet", "896"))),
    Erratum("5.1, F.1, FLOPs saved, 1B", "63.2%", "61.4%", "table 19: L = 32, and less attention",
            100 * (1 - flops_of_table_19("CR-Net", "1B") / flops_of_table_19("Full-rank", "1B"))),
    Erratum("F.1, FLOPs left, 7B", "36.8%", "37.3%", "table 19 prints 0.367",
            100 * flops_of_table_19("CR-Net", "7B") / flops_of_table_19("Full-rank", "7B")),
    Erratum("4.2, FLOPs saved against GCP", "67.4%", "67.7%", "24Lsh^2, as table 2 says",
            100 * (1 - _CRNET_FLOPS / flops_of_table_2("Vanilla GCP"))),
    Erratum("4.2, FLOPs saved against CoLA-M", "8.0%", "9.5%", "20.67Lshr, as table 2 says",
            100 * (1 - _CRNET_FLOPS / flops_of_table_2("CoLA-M", 1024))),
    Erratum("5.2, low-rank first layer", "3.5%", "3.9%", "table 6", 100 * (19.68 / 18.95 - 1)),
    Erratum("E.2.2, steps to LoRA's perplexity", "29.02%", "26.7%", "table 11: 3.5B of 13.1B; "
            "29.02% is 3.8B", 100 * 3.5 / 13.1),
    Erratum("E.2.2, speed against LoRA", "18.489x", "15.66x", "unexplained; counted as CoLA's "
            "1.326x: 4.226 / 0.930 / 0.2902", 4.226 / 0.930 / 0.2902),
    Erratum("table 16, size", "8B", "1.9B", "its shape; the text says 1B",
            num_parameters("LLaMA-3 1B") / 1e9),
    Erratum("table 20, share in [0, 0.2)", "0.05625", "0.05590", "9 of 160; but 23 x 7 = 161",
            9 / (7 * (sizes_of("350M").num_layers - 1))),
    Erratum("table 22, caption, 70B", "127.63 s", "67.63 s", "117.53, not 177.53",
            _SAVED_S - 3.391),
    Erratum("G, saved over added time, 70B", "about 30", "20.9", "71.02 / 3.391", _SAVED_S / 3.391),
    Erratum("G, eq. 48, 70B", "238.0 GB", "255.6 GB", "divided by 2^30, not 10^9; then 3.993 s",
            boundary_gib("CR-Net", "70B") * GIB / 1e9),
    Erratum("G, eq. 48, full rank, 13B", "1.88 GB", "1.25 GB", "3 passes; the footnote has 2",
            boundary_gib("Full-rank", "13B", num_passes=2)),
    Erratum("G, memory of states saved, 70B", "50%", "59%", "r = h/4",
            100 * (1 - _CRNET_DEVICE_GIB / _FULL_DEVICE_GIB)),
    Erratum("G, net memory saved a device, 70B", "29.6 GB", "25.5 GB", "unexplained; meant in GiB",
            _FULL_DEVICE_GIB - _CRNET_DEVICE_GIB - _ADDED_GIB),
    Erratum("G, measured bandwidth", "192.5 GB/s", "unknown", "in 1.380 s that is 265.7 GB; eq. 48 "
            "gives 255.6 for table 21's 4,096 tokens, 16.0 for this run's 256"),
    Erratum("abstract", "60M to 7B", "60M to 13B", "5.1, table 5"),
    Erratum("3.3, rebuilding error", "validated in 5.2", "nowhere", "5.2 has no such experiment; "
            "in bf16 at beta 0.5 the bound over 7 layers is above 1"),
    Erratum("table 8, Qwen-3", "1000 warm-up iterations, evaluation every 500", "less than 100",
            "the run has 100 steps"),
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
    Erratum("C.1.2, what is rebuilt", "l + 1 not in A", "l not in A", "L - |A| layers; those that "
            "are kept need no product"),
    Erratum("C.1.2, gate and up", "r x h", "r x f", "its own 4(L - |A|)sfr"),
    Erratum("theorem 1", "r < r0", "r <= r0", "the proof. r0 is at most (1 - eps)^2 of a stable "
            "rank, and already white noise d x d has 0.25d: it does not reach the ranks in use"),
    Erratum("algorithm 1", "X A for l = 1 ... L", "for l = 2 ... L", "3.3; 7(L - 1)sr of eq. 38"),
    Erratum("F.2, figures of learnable beta", "5 and 6", "5 and 9", "6 is ResFormer's"),
    Erratum("F.2, large beta", "the low-rank part rules", "history rules", "eq. 6; 3.2 is right"),
)
# fmt: on
