"""Write the tables of comparison.md from the results of its studies.

    python docs/comparison_page.py                          # from benchmarks/
    python docs/comparison_page.py abstracts=FOLDER ...     # take a study's results first

FOLDER: what ``crnet compare`` wrote (its ``--out``). Its rows that have begun go to benchmarks/,
the pictures that the page names beside it. A test writes the tables anew and compares.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from crnet.compare import results
from crnet.markdown import markdown_table

HERE = Path(__file__).parent
PAGE = HERE / "comparison.md"
BENCHMARKS = HERE.parent / "benchmarks"
STUDIES = {
    "abstracts": "2026-11-27-abstracts.json",
    "tokens": "2026-11-27-abstracts-tokens.json",
    "mends": "2026-11-27-abstracts-mends.json",
    "depth": "2026-11-27-abstracts-depth.json",
    "confirm": "2026-11-27-abstracts-confirm.json",
    "width": "2026-11-27-abstracts-width.json",
    "embedding": "2026-11-27-abstracts-embedding.json",
    "embedding-cola": "2026-11-27-abstracts-embedding-cola.json",
    "embedding-confirm": "2026-11-27-abstracts-embedding-confirm.json",
    "embedding-tokens": "2026-11-27-abstracts-embedding-tokens.json",
    "embedding-depth": "2026-11-27-abstracts-embedding-depth.json",
    "embedding-mends": "2026-11-27-abstracts-embedding-mends.json",
}
"""By the name of a study on the page, the file of its results."""
Json = dict[str, Any]


def take(name: str, folder: Path) -> None:
    """Keep the rows of a study that have begun, and the pictures of it that the page shows."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {
        row: figures
        for row, figures in found["rows"].items()
        if any(each["val_loss"] is not None for each in _tried(figures))
    }
    verdicts = [each for each in found["verdicts"] if {each["row"], each["other"]} <= rows.keys()]
    kept = found | {"rows": rows, "verdicts": verdicts}
    text = json.dumps(kept, indent=1) + "\n"
    (BENCHMARKS / STUDIES[name]).write_text(text, encoding="utf-8")
    shown = re.findall(rf"\(comparison-{name}-(\w+)\.png\)", PAGE.read_text(encoding="utf-8"))
    for picture in shown:
        shutil.copy(folder / f"{picture}.png", HERE / f"comparison-{name}-{picture}.png")


def _tried(row: Json) -> list[Json]:
    """A row's trials, or its runs where nothing is tuned."""
    return row["tuning"]["points"] if row["tuning"] else row["runs"]


def finals(found: Json) -> str:
    """Every run that has come to its end."""
    heads = ("", "best", "loss by seed", "mean", "perplexity", "bits per byte", "parameters")
    heads += ("MFLOPs a token",)
    lines = []
    for name, row in found["rows"].items():
        ended = [run for run in row["runs"] if run["val_loss"] is not None]
        if not ended:
            continue
        losses = [run["val_loss"] for run in ended]
        means = {
            key: statistics.mean(run[key] for run in ended)
            for key in ("val_loss", "val_perplexity", "val_bits_per_byte")
        }
        rate = {key: row["settings"][key] for key in row["settings"] if key == "optimizer.lr"}
        best = row["best"] or rate  # where nothing is tuned
        cells = [
            *(name, results.in_words(best), " / ".join(f"{loss:.4f}" for loss in losses)),
            *(f"{means['val_loss']:.4f}", f"{means['val_perplexity']:.2f}"),
            *(f"{means['val_bits_per_byte']:.4f}", f"{row['parameters']:,}"),
            f"{row['flops_a_token'] / 1e6:.1f}",
        ]
        lines.append(cells)
    return markdown_table(heads, lines)


def verdicts(found: Json) -> str:
    """Those that were judged."""
    judged = [each for each in found["verdicts"] if each["difference"] is not None]
    return results.verdicts(found | {"verdicts": judged})


def streams(found: Json) -> str:
    """The size of what each block reads, at the end of each run."""
    lasts = {name: list(steps.values())[-1]["blocks"] for name, steps in found["runs"].items()}
    count = max(map(len, lasts.values()))
    lines = [
        [name, *(f"{block['stream']:.2f}" for block in blocks)] for name, blocks in lasts.items()
    ]
    return markdown_table(["block reads", *(str(number + 1) for number in range(count))], lines)


def carries(found: Json) -> str:
    """What CR-Net's maps made of their carries, by position and block, at the end."""
    run = next(run for name, run in found["runs"].items() if name.startswith("crnet"))
    blocks = list(run.values())[-1]["blocks"]
    lines = []
    for position in (key for key, value in blocks[0].items() if isinstance(value, dict)):
        maps = [block[position] for block in blocks[1:]]
        lines.append([position, *(f"{each['gain']:.2f}, {each['carried']:.0%}" for each in maps)])
    heads = ["", *(f"block {number}" for number in range(2, len(blocks) + 1))]
    return markdown_table(heads, lines)


ANATOMIES = {
    "anatomy": "2026-11-27-anatomy.json",
    "anatomy-embedding": "2026-11-27-anatomy-embedding.json",
}
"""Of ``runs/anatomy.py``."""
TABLES = {"finals": finals, "verdicts": verdicts, "tuning": results.tuning_table}


def page(text: str) -> str:
    """With the tables as the results have them."""
    wanted = [(study, file, TABLES) for study, file in STUDIES.items()]
    looks = {"streams": streams, "carries": carries}
    wanted += [(name, file, looks) for name, file in ANATOMIES.items()]
    for study, file, tables in wanted:
        if not (BENCHMARKS / file).exists():
            continue
        found = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))
        for name, table in tables.items():
            pattern = rf"(<!-- {name} {study} -->\n).*?(\n<!-- end -->)"
            text = re.sub(
                pattern, lambda m, t=table, f=found: f"{m[1]}\n{t(f)}\n{m[2]}", text, flags=re.S
            )
    return text


def main() -> None:
    for word in sys.argv[1:]:
        name, _, folder = word.partition("=")
        take(name, Path(folder))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
