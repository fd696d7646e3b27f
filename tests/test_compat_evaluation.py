"""The evaluation of the GaLore family, against its formula written out."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.data.prepare import prepare
from crnet.data.rows import Rows, validation_batches
from crnet.data.shards import Prepared
from crnet.errors import ConfigError
from crnet.inference.asked import TaskOptions, check_asked
from crnet.inference.compat import evaluate_compat
from crnet.inference.evaluate import evaluate
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from test_scores import on

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2}


@pytest.fixture
def prepared(corpus: Path) -> Prepared:
    return prepare(on(corpus), progress=False)


def made(prepared: Prepared, linear: str = "crnet") -> LanguageModel:
    config = ModelConfig(**SHAPE, linear=linear, rank="8", vocab_size=prepared.vocab_size)
    return build(model_spec(config), 3)


@pytest.mark.parametrize("linear", ["full", "crnet"])
@pytest.mark.parametrize(("batch_size", "processes"), [(3, 1), (2, 3), (1000, 1)])
def test_against_the_script_written_out(
    prepared: Prepared, linear: str, batch_size: int, processes: int
) -> None:
    """Every process: a counter that begins at 1, means of batches in bf16, then their mean."""
    rows, model = Rows(prepared, "validation", 16, "document"), made(prepared, linear)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = evaluate_compat(model, rows, 400, batch_size, processes)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())

    narrow = copy.deepcopy(model)
    for name, parameter in narrow.named_parameters():
        if "beta" not in name:
            parameter.data = parameter.data.bfloat16()
    every = list(validation_batches(rows, 1, 400))
    shares = []
    for process in range(processes):
        mine, total, counter = every[process::processes], 0.0, 1
        for at in range(0, len(mine), batch_size):
            part = mine[at : at + batch_size]
            tokens, targets = (torch.cat(each) for each in zip(*part, strict=True))
            with torch.no_grad():
                logits = narrow.logits(tokens)
            assert logits.dtype == torch.bfloat16
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            assert loss.dtype == torch.bfloat16
            total, counter = total + float(loss), counter + 1
        shares.append(total / counter)
    assert found.loss == pytest.approx(sum(shares) / processes, rel=1e-9)
    assert found.perplexity == math.exp(found.loss)


def test_it_is_the_true_loss_times_n_over_n_plus_1_but_for_bf16(prepared: Prepared) -> None:
    """Rows of equal length in batches of equal size; and the more processes, the smaller."""
    rows, model = Rows(prepared, "validation", 16), made(prepared, "full")
    true = evaluate(model, rows, 24 * 16).loss
    last = math.inf
    for processes in (1, 2, 4):
        found = evaluate_compat(model, rows, 24 * 16, 2, processes)
        assert found.batches == 12 // processes
        wanted = true * found.batches / (found.batches + 1)
        assert found.loss == pytest.approx(wanted, rel=2**-7)
        assert found.loss < last
        last = found.loss


def test_a_loss_of_a_batch_has_eight_bits(prepared: Prepared) -> None:
    rows, model = Rows(prepared, "validation", 16), made(prepared)
    loss = 2 * evaluate_compat(model, rows, 400, 1000).loss
    assert 4 <= loss < 8
    assert loss * 2**5 == round(loss * 2**5)


def test_what_it_needs_is_said(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match="fewer"):
        evaluate_compat(made(prepared), Rows(prepared, "validation", 16), 32, 1, 500)
    for options, protocol, said in (
        ({}, "compat", "say --batch-size"),
        ({"batch_size": 0}, "compat", "--batch-size is 0; it must be above zero"),
        ({"batch_size": 2, "processes": 0}, "compat", "--processes is 0"),
        ({"processes": 2}, "rows", "--processes is of --protocol compat"),
        ({"batch_size": 2, "limit": 3}, "compat", "--limit is of --tasks"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_asked(protocol, False, TaskOptions(**options), {})
    with pytest.raises(ConfigError, match="--window has no effect with --protocol compat"):
        check_asked("compat", False, TaskOptions(batch_size=2), {"--window": 3})
