"""The outputs of maps beside those of the block below: by hand, by another model, by theorem."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import api
from crnet.cli.app import main
from crnet.config.model_spec import model_spec
from crnet.errors import ConfigError
from crnet.measure.examples import batch, small_model
from crnet.measure.observe import BETAS, Observed, averages, observe
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from test_cli import train_words


def outputs_of(model: LanguageModel, tokens: Tensor) -> dict[tuple[int, str], Tensor]:
    """(N, F) of every map, by block (from 1) and position, taken where blocks take them."""
    found = {}
    for name, module in model.named_modules():
        for slot in (slot for block in model.spec.slots for slot in block):
            if name == model.spec.map_name(slot):
                key = slot.layer_idx + 1, slot.position

                def take(module: Any, _: Any, output: Any, key: Any = key) -> None:
                    bias = 0 if module.bias is None else module.bias
                    found[key] = (output[0] + bias).flatten(0, -2).double()

                module.register_forward_hook(take)
    with torch.no_grad():
        model.logits(tokens)
    return found


def by_hand(here: Tensor, below: Tensor, beta: float, rank: int) -> float:
    """Eq. 3 and 4, with a real decomposition."""
    left = here - beta * below
    u, s, vh = torch.linalg.svd(left, full_matrices=False)
    estimate = beta * below + u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    return float((estimate - here).norm() / here.norm())


@pytest.mark.parametrize(("linear", "architecture"), [("crnet", "llama"), ("full", "gpt2")])
def test_errors_are_those_of_the_equations(linear: str, architecture: str) -> None:
    config = small_model(linear=linear, architecture=architecture, num_kv_heads=None, init_std=0.3)
    model = build(model_spec(config), seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they begin at 0
            torch.nn.init.normal_(parameter)
    tokens, targets = batch()
    found = observe(model, [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])])
    outputs = outputs_of(model, tokens)
    positions = [position.name for position in model.spec.positions]
    assert {(it.block, it.position) for it in found} == {(b, p) for b in (2, 3) for p in positions}
    assert {each.rank for each in found} == {4, 8}
    for each in found:
        here, below = (outputs[each.block - gap, each.position] for gap in (0, 1))
        for beta in BETAS:
            wanted = by_hand(here, below, beta, each.rank)
            assert each.errors[beta] == pytest.approx(wanted, rel=1e-4, abs=1e-6), (each, beta)
        assert each.direct == each.errors[0.0]
        assert each.error == min(each.errors.values()) == each.errors[each.beta]
        cosine = torch.cosine_similarity(here.flatten(), below.flatten(), dim=0)
        assert each.similarity == pytest.approx(float(cosine), rel=1e-6)
        stable = float(below.norm() ** 2 / torch.linalg.matrix_norm(below, ord=2) ** 2)
        assert each.stable_rank_below == pytest.approx(stable, rel=1e-6)
        assert each.rank_bound == pytest.approx(max(each.similarity, 0) ** 2 * stable)


def test_below_its_bound_the_theorem_holds() -> None:
    """At the proof's beta, eq. 3 is no worse; above the bound nothing is said."""
    model = build(model_spec(small_model(linear="crnet")), seed=0)
    found = observe(model, [batch()], rank_fracs=(1 / 16, 0.5))
    promised = [each for each in found if each.beta_of_theorem is not None]
    assert promised
    assert len(promised) < len(found)
    for each in promised:
        assert each.rank < each.rank_bound
        assert each.beta_of_theorem is not None
        assert each.beta_of_theorem > 0
        assert each.error_of_theorem is not None
        assert each.error_of_theorem <= each.direct
    assert all(it.error_of_theorem is None for it in found if it.rank >= it.rank_bound)


def test_tokens_without_a_target_do_not_count() -> None:
    model = build(model_spec(small_model()), seed=0)
    tokens, targets = batch()
    padded = torch.cat([tokens, torch.zeros_like(tokens)], dim=1)
    ignored = torch.cat([targets, torch.full_like(targets, -100)], dim=1)
    plain, ours = observe(model, [(tokens, targets)]), observe(model, [(padded, ignored)])
    for one, other in zip(plain, ours, strict=True):
        assert other.error == pytest.approx(one.error, rel=1e-4, abs=1e-6)
        assert other.similarity == pytest.approx(one.similarity, rel=1e-4)


@pytest.mark.slow
def test_models_of_transformers() -> None:
    """A LLaMA of theirs with our weights is observed as ours is; GPT-2's q, k, v lie side by
    side."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ours = build(model_spec(small_model(linear="full", init_std=0.3)), seed=0)
    shape = ours.spec.shape
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=shape.norm_eps,
        )
    )
    theirs.load_state_dict(ours.state_dict())
    for one, other in zip(observe(ours, [batch()]), observe(theirs, [batch()]), strict=True):
        assert (one.block, one.position, one.rank) == (other.block, other.position, other.rank)
        assert other.direct == pytest.approx(one.direct, rel=1e-3, abs=1e-6)
        assert other.similarity == pytest.approx(one.similarity, abs=1e-4)
    small = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    found = observe(GPT2LMHeadModel(small), [batch()], rank_fracs=(0.25,))
    assert [each.position for each in found] == ["q", "k", "v", "o", "up", "down"]


def test_what_cannot_be_observed_is_refused() -> None:
    model = build(model_spec(small_model()), seed=0)
    with pytest.raises(ConfigError, match="shares that make a rank of 1"):
        observe(model, [batch()], rank_fracs=(0.01,))
    with pytest.raises(ConfigError, match="no token to observe"):
        observe(model, [])
    with pytest.raises(ConfigError, match="two blocks or more"):
        observe(build(model_spec(small_model(num_layers=1)), seed=0), [batch()])
    with pytest.raises(ConfigError, match="two blocks or more"):
        observe(torch.nn.Linear(2, 2), [batch()])


def test_means_are_over_the_blocks() -> None:
    model = build(model_spec(small_model()), seed=0)
    found = observe(model, [batch()], rank_fracs=(0.25,))
    rows = {row["position"]: row for row in averages(found)}
    mine = [each.error for each in found if each.position == "up"]
    assert rows["up"]["error"] == pytest.approx(sum(mine) / 2)
    assert rows["all"]["error"] == pytest.approx(sum(it.error for it in found) / len(found))


def test_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    with pytest.raises(SystemExit):
        main(train_words(corpus, run, train__steps="1"))
    capsys.readouterr()
    words = ["observe", str(run), "--rank-fracs", "0.25", "--data.validation-tokens", "200"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--json", "--plot", str(drawn / "seen")])
    assert end.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert {path.name for path in drawn.iterdir()} == {"seen.png", "seen.svg"}
    found = api.observe(run, rank_fracs=(0.25,), validation_tokens=200)
    assert [row["error"] for row in told["maps"]] == [each.error for each in found]
    assert set(told["maps"][0]) == {each.name for each in dataclasses.fields(Observed)}
    assert all(math.isfinite(row["direct"]) for row in told["averages"])
