"""How should the weights of a bf16 run take their updates? Choices x seeds on a text file.

    python runs/bf16_updates.py --corpus FILE --out OUT [--jobs 1]
    python runs/bf16_updates.py --quick --out OUT     # one step of a tiny shape, one seed

Every run trains CR-Net in the same shape on the same rows in the same order; only the precision and
``--train.bf16-update`` differ. Writes OUT/bf16_updates.json and prints the table for LOG.md.
``still``: names of trained tensors that end as they began, to the bit; ``still_at_1``: items that
began at 1 and are still 1, of how many.

JSON bf16_updates: by name step, val_loss, val_perplexity, val_bits_per_byte, val_accuracy,
val_tokens, val_bytes, val_precision, tokens, tokens_per_s_median, beta, state_bytes, still,
still_at_1.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import sweep

CHOICES = {
    "fp32": "--train.precision fp32",
    **{
        name: f"--train.precision bf16 --train.bf16-update {name}"
        for name in ("masters", "vectors", "stochastic", "plain")
    },
}
SEEDS = (0, 1, 2)
COMMON = (
    "--model.linear crnet --model.rank 16 --model.hidden-size 64 --model.intermediate-size 176 "
    "--model.num-layers 3 --model.num-heads 2 --data.vocab-size 320 --data.sequence-length 128 "
    "--data.documents paragraph --data.validation-tokens 32768 --train.steps 300 "
    "--train.batch-size 2 --train.threads 1 --train.device cpu --train.eval-every-steps 0 "
    "--train.save-every-steps 100"
).split()
QUICK = [*sweep.shape_words(sweep.QUICK_SHAPE), *sweep.QUICK_COMMON, "--train.steps=1"]


def movement(folder: Path) -> dict[str, Any]:
    """What a finished run's weights are beside those that it began with, and its bytes of state."""
    from crnet.cost.workload import workload
    from crnet.inference.load import load_model, weights_dtype
    from crnet.model.build import build
    from crnet.storage import checkpoint

    saved = checkpoint.newest(folder)
    assert saved is not None
    work, dtype = workload(saved.config), weights_dtype(saved.config.train.precision)
    first = build(work.spec, saved.config.train.seed, dtype=dtype)
    still, at_1, began_at_1 = [], 0, 0
    for name, (_, parameter) in load_model(saved).trained().items():
        before = first.get_parameter(name)
        if parameter.equal(before):
            still.append(name)
        ones = before == 1
        began_at_1 += int(ones.sum())
        at_1 += int((parameter[ones] == 1).sum())
    return {"state_bytes": work.state_bytes, "still": still, "still_at_1": [at_1, began_at_1]}


def table(found: dict[str, dict], seeds: tuple[int, ...]) -> list[str]:
    """The rows of LOG.md."""
    lines = [
        "| update | validation loss by seed | mean | still at 1 | tensors still | bytes a weight |",
        "|---|---|---|---|---|---|",
    ]
    for name in CHOICES:
        rows = [found[f"{name}-seed{seed}"] for seed in seeds]
        if any("failed" in row for row in rows):
            lines.append(f"| {name} | failed | | | | |")
            continue
        losses = [row["val_loss"] for row in rows]
        at_1, began = (sum(row["still_at_1"][i] for row in rows) for i in (0, 1))
        still = sum(len(row["still"]) for row in rows)
        size = sum(rows[0]["state_bytes"].values())
        items = sum(found[f"fp32-seed{seeds[0]}"]["state_bytes"].values()) / 16
        each = " / ".join(f"{loss:.4f}" for loss in losses)
        lines.append(
            f"| {name} | {each} | {statistics.mean(losses):.4f} | {at_1} of {began} | {still} | "
            f"{size / items:.2f} |"
        )
    return lines


def main() -> None:
    parser = sweep.make_parser(__doc__)
    parser.add_argument("--corpus", type=Path, help="a text file")
    given = parser.parse_args()
    if given.quick:
        common, seeds, given.jobs = [*QUICK, *sweep.QUICK_CORPUS], SEEDS[:1], 0
    elif given.corpus is None:
        parser.error("--corpus names a text file; or say --quick")
    else:
        common, seeds = [*COMMON, "--data.source", str(given.corpus)], SEEDS
    specs = {
        f"{name}-seed{seed}": [*common, *words.split(), "--train.seed", str(seed)]
        for seed in seeds
        for name, words in CHOICES.items()
    }
    found = sweep.run_all(specs, given.out, given.jobs)
    for name, row in found.items():
        if "failed" not in row:
            row |= movement(given.out / name)
    sweep.write_report(given.out / "bf16_updates.json", json.loads(json.dumps(found)))
    print("\n".join(table(found, seeds)))


if __name__ == "__main__":
    main()
