"""What is called better: Welch's t, Holm's correction, a least difference. Fixed in the study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crnet.compare.study import Rule, Study
from crnet.errors import ConfigError

NEEDS = "a rule of significance needs the package scipy; pip install 'crnet[compare]'"

Called = Literal["better", "worse", "tie", "not judged"]


@dataclass(frozen=True)
class Verdict:
    """A row beside another one."""

    row: str
    other: str
    difference: float | None
    """Of the mean losses, nats: below 0, the row's is lower."""
    p: float | None
    """Of Welch's test, two-sided."""
    p_corrected: float | None
    """After Holm's correction over all pairs of the study."""
    called: Called
    why: str


def check_installed() -> None:
    """Raise ``ConfigError`` where scipy is missing: before hours of training, not after."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ConfigError(NEEDS) from error


def judge(
    losses: Mapping[str, Sequence[float | None]], pairs: Sequence[tuple[str, str]], rule: Rule
) -> list[Verdict]:
    """Judge every pair.

    Args:
        losses: by row, a seed each; None: that run failed or is not there yet.
        pairs: of rows; Holm's correction is over all of them. One that cannot be judged counts as
            the least significant, so that no verdict is undone by a run that ends later.
    """
    tests = [welch(losses[one], losses[other]) for one, other in pairs]
    corrected = holm([1.0 if p is None else p for p in tests])
    found = []
    for (one, other), p, p_corrected in zip(pairs, tests, corrected, strict=True):
        if p is None:
            failed = [
                name for name in (one, other) if len(_known(losses[name])) < len(losses[name])
            ]
            why = f"{' and '.join(failed)}: not all seeds have ended well" if failed else "one seed"
            found.append(Verdict(one, other, None, None, None, "not judged", why))
            continue
        difference = statistics.mean(_known(losses[one])) - statistics.mean(_known(losses[other]))
        found.append(_verdict(one, other, difference, p, p_corrected, rule))
    return found


def _verdict(
    one: str, other: str, difference: float, p: float, corrected: float, rule: Rule
) -> Verdict:
    if corrected >= rule.level:
        why = f"p {corrected:.2g} is not below {rule.level:g}"
        return Verdict(one, other, difference, p, corrected, "tie", why)
    if abs(difference) < rule.least_nats:
        why = f"the difference is below {rule.least_nats:g} nats"
        return Verdict(one, other, difference, p, corrected, "tie", why)
    called: Called = "better" if difference < 0 else "worse"
    return Verdict(one, other, difference, p, corrected, called, f"p {corrected:.2g}")


def welch(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Two-sided p of Welch's t-test (1947); None: a run is missing, or there is one seed."""
    one, other = _known(first), _known(second)
    if len(one) < max(len(first), 2) or len(other) < max(len(second), 2):
        return None
    if statistics.pvariance(one) == statistics.pvariance(other) == 0:
        return 1.0 if one[0] == other[0] else 0.0
    from scipy.stats import ttest_ind

    test: Any = ttest_ind(one, other, equal_var=False)
    return float(test.pvalue)


def detectable(study: Study) -> float | None:
    """How far apart two rows' means must be for a verdict, in deviations of a seed's loss; None:
    the study has no rule.

    Of rows with one deviation, and of the pair that Holm's correction tests first: with 3 seeds, 7
    pairs and a level of 0.01 it is 6.4, with 6 seeds and 3 pairs 2.2.

    Raises:
        ConfigError: scipy is missing.
    """
    if study.rule is None:
        return None
    check_installed()
    from scipy.stats import t

    num_seeds, level = len(study.seeds), study.rule.level / len(study.pairs())
    return float(t.ppf(1 - level / 2, 2 * num_seeds - 2)) * math.sqrt(2 / num_seeds)


def holm(values: Sequence[float]) -> list[float]:
    """The p of each of several tests, corrected (Holm 1979): times the tests not yet passed."""
    found = [1.0] * len(values)
    greatest = 0.0
    for passed, idx in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        greatest = max(greatest, min(1.0, (len(values) - passed) * values[idx]))
        found[idx] = greatest
    return found


def _known(losses: Sequence[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None and math.isfinite(loss)]
