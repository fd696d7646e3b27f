"""Write the tables of comparison.md from the results of its studies.

    python docs/comparison_page.py                          # from benchmarks/
    python docs/comparison_page.py abstracts=FOLDER ...     # take a study's results first

FOLDER: what ``crnet compare`` wrote (its ``--out``). Its rows that have begun go to benchmarks/,
its picture of the tuning beside the page. A test writes the tables anew and compares.
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

HERE = Path(__file__).parent
PAGE = HERE / "comparison.md"
BENCHMARKS = HERE.parent / "benchmarks"
STUDIES = {
    "abstracts": "2026-11-27-abstracts.json",
    "tokens": "2026-11-27-abstracts-tokens.json",
    "depth": "2026-11-27-abstracts-depth.json",
}
"""By the name of a study on the page, the file of its results."""
Json = dict[str, Any]


def take(name: str, folder: Path) -> None:
    """Keep the rows of a study that have begun, and its picture of the tuning."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = {
        row: figures
        for row, figures in found["rows"].items()
        if any(point["val_loss"] is not None for point in figures["tuning"]["points"])
    }
    verdicts = [each for each in found["verdicts"] if {each["row"], each["other"]} <= rows.keys()]
    kept = found | {"rows": rows, "verdicts": verdicts}
    text = json.dumps(kept, indent=1) + "\n"
    (BENCHMARKS / STUDIES[name]).write_text(text, encoding="utf-8")
    shutil.copy(folder / "tuning.png", HERE / f"comparison-{name}-tuning.png")


def finals(found: Json) -> str:
    """Every run that has come to its end."""
    heads = ("", "best", "loss by seed", "mean", "perplexity", "bits per byte", "parameters")
    heads += ("MFLOPs a token",)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in found["rows"].items():
        ended = [run for run in row["runs"] if run["val_loss"] is not None]
        if not ended:
            continue
        best = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row["best"].items())
        losses = [run["val_loss"] for run in ended]
        means = {
            key: statistics.mean(run[key] for run in ended)
            for key in ("val_loss", "val_perplexity", "val_bits_per_byte")
        }
        cells = [
            *(name, best, " / ".join(f"{loss:.4f}" for loss in losses), f"{means['val_loss']:.4f}"),
            *(f"{means['val_perplexity']:.2f}", f"{means['val_bits_per_byte']:.4f}"),
            *(f"{row['parameters']:,}", f"{row['flops_a_token'] / 1e6:.1f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(found: Json) -> str:
    """Those that were judged."""
    judged = [each for each in found["verdicts"] if each["difference"] is not None]
    return results.verdicts(found | {"verdicts": judged})


TABLES = {"finals": finals, "verdicts": verdicts, "tuning": results.tuning_table}


def page(text: str) -> str:
    """With the tables as the results have them."""
    for study, file in STUDIES.items():
        if not (BENCHMARKS / file).exists():
            continue
        found = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))
        for name, table in TABLES.items():
            pattern = rf"(<!-- {name} {study} -->\n).*?(\n<!-- end -->)"
            filled = table(found)
            text = re.sub(pattern, lambda m, t=filled: f"{m[1]}\n{t}\n{m[2]}", text, flags=re.S)
    return text


def main() -> None:
    for word in sys.argv[1:]:
        name, _, folder = word.partition("=")
        take(name, Path(folder))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
