"""How the next token is chosen, and when a text ends. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crnet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_tokens: int = 100
    """Most tokens written after the prompt."""
    temperature: float = 1.0
    """Divides the logits: below 1 the likely tokens gain, above 1 the unlikely ones."""
    top_k: int | None = None
    """Choose among so many of the likeliest tokens; none: all."""
    top_p: float | None = None
    """Choose among the fewest likeliest tokens that hold this share of the probability (after
    top-k); none: all."""
    greedy: bool = False
    """Always take the likeliest token."""
    seed: int = 0
    """Seed of the draws."""
    stop_at_end: bool = True
    """Stop where the model writes end-of-text; else that token is written like any other."""
    use_cache: bool = True
    """Keep the keys and values of earlier tokens; else recompute them for every token."""


def check_sampling(sampling: Sampling) -> None:
    """Raise one ``ConfigError`` with every problem of the options."""
    if problems := sampling_problems(sampling):
        raise ConfigError(problems)


def sampling_problems(sampling: Sampling) -> list[str]:
    """What is wrong with the options, one sentence each."""
    problems = []
    if sampling.max_tokens < 1:
        problems.append(f"--max-tokens is {sampling.max_tokens}; it must be at least 1")
    if sampling.max_tokens >= 2**31:
        problems.append(f"--max-tokens is {sampling.max_tokens}; it must be below 2**31")
    if sampling.temperature == 0:
        problems.append("--temperature is 0; use --greedy to take the likeliest token always")
    elif not (sampling.temperature > 0 and math.isfinite(sampling.temperature)):
        problems.append(f"--temperature is {sampling.temperature}; it must be above zero, finite")
    if sampling.top_k is not None and sampling.top_k < 1:
        problems.append(
            f"--top-k is {sampling.top_k}; it must be at least 1; leave it out to choose among all"
        )
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        problems.append(f"--top-p is {sampling.top_p}; it is a share and must lie in (0, 1]")
    if sampling.seed < 0:
        problems.append(f"--seed is {sampling.seed}; it must be zero or more")
    if sampling.greedy:
        given = {
            "--temperature": sampling.temperature != 1,
            "--top-k": sampling.top_k is not None,
            "--top-p": sampling.top_p is not None,
        }
        if without_effect := [flag for flag, is_given in given.items() if is_given]:
            problems.append(
                f"--greedy takes the likeliest token, so {', '.join(without_effect)} would have no "
                "effect; leave out one or the other"
            )
    return problems
