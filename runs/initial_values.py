"""Which initial values for A, B and beta? Candidates x seeds on the arXiv abstracts.

    python runs/initial_values.py --abstracts DIR --out OUT [--jobs 2]
    python runs/initial_values.py --quick --out OUT     # one step of a tiny shape, one seed

Each candidate trains the same shape on the same rows in the same order; only the initial values
differ. Writes OUT/initial_values.json and prints the table for LOG.md.

JSON initial_values: by name step, val_loss, val_perplexity, val_bits_per_byte, val_accuracy,
val_tokens, val_bytes, val_precision, tokens, tokens_per_s_median, beta.
"""

from __future__ import annotations

import statistics

import sweep

CANDIDATES = {
    "balanced, beta 0.5": "--model.crnet.init balanced --model.crnet.beta-init 0.5",
    "balanced, beta 0.8": "--model.crnet.init balanced --model.crnet.beta-init 0.8",
    "balanced, beta 1": "--model.crnet.init balanced --model.crnet.beta-init 1.0",
    "spectral, beta 0.5": "--model.crnet.init spectral --model.crnet.beta-init 0.5",
    "spectral, beta 1": "--model.crnet.init spectral --model.crnet.beta-init 1.0",
    "zero-b, beta 1": "--model.crnet.init zero-b --model.crnet.beta-init 1.0",
}
SEEDS = (0, 1)
COMMON = (
    "--model.linear crnet --model.rank 48 --model.hidden-size 192 --model.intermediate-size 512 "
    "--model.num-layers 7 --model.num-heads 6 --data.vocab-size 8192 --data.sequence-length 256 "
    "--data.validation-tokens 131072 --optimizer.lr 5e-3 --train.steps 200 --train.batch-size 8 "
    "--train.threads 1 --train.eval-every-steps 0 --train.save-every-steps 100"
).split()
QUICK = [*sweep.shape_words(sweep.QUICK_SHAPE), *sweep.QUICK_COMMON, "--train.steps=1"]


def run_name(candidate: str, seed: int) -> str:
    """The folder of one run."""
    return f"{candidate.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def main() -> None:
    given, corpus = sweep.begin(__doc__)
    common, seeds = (QUICK, SEEDS[:1]) if given.quick else (COMMON, SEEDS)
    specs = {
        run_name(name, seed): [*common, *corpus, *words.split(), "--train.seed", str(seed)]
        for name, words in CANDIDATES.items()
        for seed in seeds
    }
    found = sweep.run_all(specs, given.out, given.jobs)
    sweep.write_report(given.out / "initial_values.json", found)
    print("| initial values | perplexity by seed | mean | beta after: least, median, most |")
    print("|---|---|---|---|")
    for name in CANDIDATES:
        rows = [found[run_name(name, seed)] for seed in seeds]
        if any("failed" in row for row in rows):
            print(f"| {name} | failed | | |")
            continue
        values = [row["val_perplexity"] for row in rows]
        betas = ", ".join(f"{beta:.2f}" for beta in rows[0]["beta"])
        each = " / ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {each} | {statistics.mean(values):.2f} | {betas} |")


if __name__ == "__main__":
    main()
