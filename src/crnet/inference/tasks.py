"""The tasks of EleutherAI's lm-evaluation-harness (the package ``lm_eval``), in this process.

``HarnessModel`` answers the harness's three kinds of requests with a model and its tokenizer:
windows sorted by length and read in batches (``texts.score``), texts continued in batches of
prompts of one length, so that nothing is padded on the left. What it answers is what the harness's
own ``HFLM`` answers for the same weights and tokenizer. This file alone imports ``lm_eval``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import Tensor

from crnet.data.tokenizer import Tokenizer
from crnet.errors import ConfigError
from crnet.inference.evaluate import computing
from crnet.inference.generate import draw, filter_logits
from crnet.inference.sampling import Sampling, check_sampling
from crnet.inference.texts import Window, check_windows, document_windows, score
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of

MOST_NEW_TOKENS = 256
"""Where a task does not say, as in the harness."""
PROMPTS_AT_ONCE = 16
SUFFIXES = (".yaml", ".yml")
BOOTSTRAPS = 1000
"""Samples for the standard error of a metric that has no formula (perplexity): the harness's own
100,000 take minutes where a task takes seconds."""


class HarnessModel(TemplateLM):
    """A model and its tokenizer as the harness wants them."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        window: int,
        batch_size: int | None = None,
        seed: int = 0,
    ):
        """Put a model into eval mode.

        Args:
            model: on any device.
            tokenizer: the one that it was trained with.
            window: most tokens that it reads at once; longer contexts lose their beginning.
            batch_size: most rows of a batch; None: as many as ``evaluate.TOKENS_AT_ONCE`` allows,
                ``PROMPTS_AT_ONCE`` where a text is continued.
            seed: of draws, where a task asks for them.
        Raises:
            ConfigError: the model has fewer positions than ``window``.
        """
        super().__init__()
        check_windows(model, "document", window, None)
        self.model, self.ids_of = model.eval(), tokenizer
        self.max_length, self.batch_size = window, batch_size
        self._device = next(model.parameters()).device
        self._generator = generator_of(seed, "lm_eval")

    @property
    def eot_token_id(self) -> int:
        """End-of-text: also what stands before a text without context."""
        return self.ids_of.eos_id

    @property
    def tokenizer_name(self) -> str:
        """By which the harness keeps tokenized requests apart."""
        return self.ids_of.hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; never with special tokens."""
        return self.ids_of.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Log probability of each continuation, and whether all of it is the likeliest.

        A context that does not fit loses its beginning. Raises ``ConfigError`` where a continuation
        is longer than a window.
        """
        windows = []
        for idx, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"a task wants {len(continuation)} tokens scored at once, and the window has "
                    f"{self.max_length}; give a larger --window"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            windows.append((idx, Window(ids, len(continuation))))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for idx, losses, likeliest in self._score(windows):
            found[idx] = -float(losses.double().sum()), bool(likeliest.all())
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts: protocol document."""
        sums = [0.0] * len(requests)
        windows = (
            (idx, window)
            for idx, request in enumerate(requests)
            for window in document_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length
            )
        )
        for idx, losses, _ in self._score(windows):
            sums[idx] -= float(losses.double().sum())
        return sums

    def _score(self, windows: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        with computing(self.model, self._device, "fp32"):
            yield from score(self.model, windows, self.batch_size)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue each text until a stop word, end-of-text or the most tokens."""
        alike: dict[tuple[str, int], list[tuple[int, list[int]]]] = {}
        wishes = [_wishes(request.args[1], self.max_length) for request in requests]
        for idx, (request, wish) in enumerate(zip(requests, wishes, strict=True)):
            ids = self.tok_encode(request.args[0]) or [self.eot_token_id]
            ids = ids[-(self.max_length - wish["max_gen_toks"]) :]
            key = json.dumps(wish, sort_keys=True), len(ids)
            alike.setdefault(key, []).append((idx, ids))
        found = [""] * len(requests)
        size = self.batch_size or PROMPTS_AT_ONCE
        for group in alike.values():
            for start in range(0, len(group), size):
                indices, prompts = zip(*group[start : start + size], strict=True)
                texts = self._continue(prompts, wishes[indices[0]])
                for idx, text in zip(indices, texts, strict=True):
                    found[idx] = text
        return found

    def _continue(self, prompts: Sequence[list[int]], wish: Mapping[str, Any]) -> list[str]:
        """The texts that follow prompts of one length, without their stop words."""
        most, sampling = wish["max_gen_toks"], _sampling(wish)
        stops = handle_stop_sequences(list(wish["until"]), None)
        texts, ids = [""] * len(prompts), [list[int]() for _ in prompts]
        open_rows = set(range(len(prompts)))
        caches = self.model.new_caches(len(prompts[0]) + most)
        unread = torch.tensor(prompts, device=self._device)
        with computing(self.model, self._device, "fp32"):
            for _ in range(most):
                logits_BV = self.model.logits(unread, caches, last_only=True)[:, -1]
                chosen = self._choose(logits_BV[:, : self.ids_of.vocab_size], sampling)
                for row in list(open_rows):
                    if chosen[row] == self.eot_token_id:
                        open_rows.discard(row)
                        continue
                    ids[row].append(chosen[row])
                    texts[row] = self.ids_of.decode(ids[row])
                    if any(stop in texts[row] for stop in stops if stop):
                        open_rows.discard(row)
                if not open_rows:
                    break
                unread = torch.tensor(chosen, device=self._device).unsqueeze(1)
        return [_before(text, stops) for text in texts]

    def _choose(self, logits_BV: Tensor, sampling: Sampling | None) -> list[int]:
        """The next id of each row; None: the likeliest."""
        if sampling is None:
            return logits_BV.argmax(dim=-1).tolist()
        return [draw(filter_logits(row, sampling), self._generator) for row in logits_BV]


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def _wishes(given: Mapping[str, Any], window: int) -> dict[str, Any]:
    """What a task asks of a continuation. Raises ``ConfigError`` where it asks for more."""
    wish: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MOST_NEW_TOKENS))
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(set(wish) - known):
        raise ConfigError(
            f"a task's generation_kwargs ask for {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    if wish["max_gen_toks"] >= window:
        raise ConfigError(
            f"a task writes up to {wish['max_gen_toks']} tokens, and the window has {window}: none "
            "is left for the prompt; give a larger --window, or max_gen_toks in the task's "
            "generation_kwargs"
        )
    return {"until": [], **wish}


def _sampling(wish: Mapping[str, Any]) -> Sampling | None:
    """How a task draws; None: it does not."""
    if not wish.get("do_sample") or not wish.get("temperature", 1.0):
        return None
    given = {key: wish[key] for key in ("temperature", "top_k", "top_p") if key in wish}
    sampling = Sampling(**given)
    check_sampling(sampling)
    return sampling


def evaluate_tasks(
    lm: HarnessModel,
    words: Sequence[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        words: names of the harness's tasks or groups, or task files (.yaml); paths of local data in
            a file are looked for beside it first.
        num_fewshot: examples before each question; None: as the task has it.
        limit: most documents of each task.
        seed: of the choice of examples.
    Returns:
        ``tasks``: by name its metrics, as the harness names them (``acc``, ``acc_stderr``; behind a
        comma the filter, unless there is none), ``num_fewshot``, ``documents`` and ``version``;
        ``groups``, likewise.
    Raises:
        ConfigError: there is no such task or file, or its data cannot be opened.
    """
    # Those of the harness are in thousands of files.
    manager: Any = TaskManager(include_defaults=not all(word.endswith(SUFFIXES) for word in words))
    specs = [_spec(word, manager) for word in words]
    try:
        loaded = manager.load(specs)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--tasks {' '.join(words)}: cannot be opened ({reason}); the data of the harness's "
            "own tasks are on the Hugging Face hub and are fetched once: connect to the network, "
            "or name a task file whose dataset_kwargs name local data_files"
        ) from error
    manager.load = lambda *_: loaded
    with contextlib.redirect_stdout(sys.stderr):  # the harness speaks there too
        found = simple_evaluate(
            model=lm,
            tasks=list(specs),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None
    return _figures(found)


def _spec(word: str, manager: TaskManager) -> Any:
    """A task's name, or the content of its file. Raises ``ConfigError`` where there is none."""
    if not word.endswith(SUFFIXES):
        if manager.match_tasks([word]):
            return word
        raise ConfigError(
            f"--tasks {word}: the harness has no task of that name (lm-eval ls tasks names them); "
            "a task file ends in .yaml"
        )
    path = Path(word).expanduser()
    if not path.is_file():
        raise ConfigError(f"--tasks {word}: no such file")
    try:
        config = load_yaml(path, resolve_func=True)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ConfigError(f"--tasks {word}: is no task file ({error})") from error
    files = config.get("dataset_kwargs", {}).get("data_files")
    if isinstance(files, dict):
        config["dataset_kwargs"]["data_files"] = {
            split: _beside(path, name) for split, name in files.items()
        }
    return config


def _beside(path: Path, name: Any) -> Any:
    """A data file beside its task file, if it is there."""
    found = path.parent / name if isinstance(name, str) else None
    return os.fspath(found) if found is not None and found.is_file() else name


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth keeping of the harness's answer."""
    figures: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name, row in found["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in row.items()
            if isinstance(value, (int, float)) and key not in ("sample_len", "sample_count")
        }
        more = {
            "num_fewshot": found.get("n-shot", {}).get(name),
            "documents": found.get("n-samples", {}).get(name, {}).get("effective"),
            "version": found.get("versions", {}).get(name),
        }
        kind = "groups" if name in found.get("groups", {}) else "tasks"
        figures[kind][name] = metrics | more
    return figures
