"""Every architecture under every parameterization and policy, and GPT-2 beside transformers'."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import architectures, linears
from crnet.architectures import Batch
from crnet.config import defaults
from crnet.config.check import policy_problem
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig, OptimizerConfig
from crnet.measure.contract import Check
from crnet.measure.contract_cost import check_flops, check_kept_bytes
from crnet.measure.examples import Example
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan
from shapes import TINY, is_legal, may_differ

each_architecture = pytest.mark.parametrize("architecture", architectures.names())
SHAPE = dataclasses.replace(TINY, num_kv_heads=None)
PAIRS = [
    (architecture, linear)
    for architecture in architectures.names()
    for linear in linears.names()
    if is_legal(dataclasses.replace(SHAPE, architecture=architecture, linear=linear))
]
"""Of architecture and parameterization. Not among them: experts' maps that would read a carry."""
INVERTING = [
    name
    for name in architectures.names()
    if policy_problem(model_spec(dataclasses.replace(SHAPE, architecture=name)), "invert") is None
]
each_pair = pytest.mark.parametrize(("architecture", "linear"), PAIRS)


def test_what_does_not_go_together():
    """A carry of an expert's own map, one matrix for an expert of every block, the values of heads
    that have no map of their own, and inverting a layer of experts."""
    wrong = {(one, other) for one in architectures.names() for other in linears.names()} - {*PAIRS}
    experts = {("qwen3-moe", "lax"), ("qwen3-moe", "shared")}
    assert wrong == experts | {("mla", "value-resformer")}
    assert INVERTING == ["gpt2", "llama", "mla"]


def make(architecture: str, linear: str, **changed: Any) -> LanguageModel:
    config = dataclasses.replace(SHAPE, architecture=architecture, linear=linear, **changed)
    model = build(model_spec(config), 0)
    generator = torch.Generator().manual_seed(5)
    for spec, parameter in model.trained().values():
        if spec.role in ("bias", "norm"):  # off 0 and 1
            parameter.data.add_(torch.randn(spec.shape, generator=generator) * 0.1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss_sum, _ = model(*batch())
    loss_sum.backward()
    found = {}
    for name, (_, parameter) in model.trained().items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


@pytest.mark.slow
@each_pair
def test_exact_policies_agree_to_the_bit(architecture: str, linear: str):
    """Every plan that is another one: block knows neither segments nor attention that is kept."""
    model = make(architecture, linear)
    expected = gradients(model)
    plans = [
        RecomputePlan("replay", *rest) for rest in itertools.product([(), (2,)], [False, True])
    ]
    for plan in (RecomputePlan("block"), *plans):
        model.recompute(plan)
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, expected[name]), (plan, name)


@pytest.mark.parametrize("architecture", INVERTING)
def test_invert_agrees(architecture: str):
    """Within rounding: outputs rebuilt downwards over two layers, gains of 1."""
    model = make(architecture, "crnet")
    expected = gradients(model)
    model.recompute(RecomputePlan("invert"))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@each_pair
def test_logits_with_a_cache_are_those_without(architecture: str, linear: str):
    """fp32; the products are of other shapes, hence rounding."""
    model, (tokens, _) = make(architecture, linear), batch()
    whole = model.logits(tokens)
    caches = model.new_caches(8)
    parts = [model.logits(part, caches) for part in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@each_pair
def test_causal(architecture: str, linear: str):
    """Bit for bit; with experts within rounding, in fp64 (``shapes.may_differ``)."""
    model, (tokens, _) = make(architecture, linear), batch()
    limit = may_differ(model.spec.config)
    if limit:
        model = model.double()
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 31
    moved_BT = (model.logits(changed) - model.logits(tokens)).abs().amax(dim=-1)
    assert bool((moved_BT[:, :5] <= limit).all())
    assert bool((moved_BT[:, 5:] > limit).all())


@each_pair
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_the_parameters(architecture: str, linear: str, tied: bool):
    model = make(architecture, linear, tie_embeddings=tied)
    actual = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert actual == {name: spec.shape for name, spec in model.spec.tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "linear"), [pair for pair in PAIRS if pair[0] != defaults.ARCHITECTURE]
)
@pytest.mark.parametrize("check", [check_kept_bytes, check_flops])
def test_contract_with_every_parameterization(architecture: str, linear: str, check: Check):
    """What autograd keeps under each policy and precision, and FLOPs as torch counts: exact. In the
    default architecture every parameterization's own contract says so."""
    model = dataclasses.replace(SHAPE, architecture=architecture, linear=linear)
    example = Example(architectures.get(architecture), model, OptimizerConfig(lr=2e-2))
    assert list(check(example)) == []


@each_architecture
def test_problems(architecture: str):
    config = dataclasses.replace(SHAPE, architecture=architecture)
    spec = model_spec(config)
    assert spec.architecture.problems(spec.shape, spec.architecture_options) == []


def test_gpt2_has_no_grouped_heads():
    spec = model_spec(dataclasses.replace(SHAPE, architecture="gpt2", num_kv_heads=2))
    problems = spec.architecture.problems(spec.shape, spec.architecture_options)
    assert len(problems) == 1
    assert "--model.num-kv-heads 2" in problems[0]


def test_gpt2_refuses_more_tokens_than_positions():
    options = architectures.get("gpt2").Options(max_length=4)
    model = make("gpt2", "full", gpt2=options)
    assert model.max_length() == 4
    assert model.logits(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 31)
    with pytest.raises(ValueError, match="max-length is 4"):
        model.logits(torch.zeros(1, 5, dtype=torch.int64))


def test_gpt2_without_its_activation():
    """``keeps_activation`` False: the kept bytes follow, exact; the gradient of up is down's."""
    spec = make("gpt2", "full").spec
    sizes = Batch(2, 8, 4, 4)
    options = spec.architecture_options
    with_it = spec.architecture.work(spec.shape, options, sizes, True)
    without = spec.architecture.work(spec.shape, options, sizes, False)
    activated = 16 * spec.shape.intermediate_size * 4
    assert with_it.kept_bytes - without.kept_bytes == activated
    assert with_it.activation_bytes - without.activation_bytes == activated


# --- transformers' GPT-2 --------------------------------------------------------------------------


def twin() -> tuple[LanguageModel, Any]:
    """Ours and theirs in fp64 with the same weights, none of them at its first value."""
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        architecture="gpt2",
        linear="full",
        hidden_size=32,
        intermediate_size=80,
        num_layers=3,
        num_heads=4,
        vocab_size=61,
        norm_eps=1e-5,
        gpt2=architectures.get("gpt2").Options(max_length=16),
    )  # type: ignore[call-arg]
    ours = build(model_spec(config), 0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for parameter in ours.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).double() * 0.1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61,
            n_positions=16,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_inner=80,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            layer_norm_epsilon=1e-5,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    ).double()
    weights = theirs_of({name: p.detach() for name, p in ours.named_parameters()})
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return ours, theirs.eval()


BLOCK = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
OUTSIDE = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
}


def theirs_of(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names: matrices transposed, q, k and v beside one another."""
    found = {theirs: ours[name] for name, theirs in OUTSIDE.items()}
    layers = sorted({name.split(".")[2] for name in ours if name.startswith("model.layers.")})
    for idx in layers:
        for name, their_name in BLOCK.items():
            weight = ours[f"model.layers.{idx}.{name}.weight"]
            found[f"transformer.h.{idx}.{their_name}.weight"] = (
                weight.T if weight.ndim > 1 else weight
            )
            bias = ours[f"model.layers.{idx}.{name}.bias"]
            found[f"transformer.h.{idx}.{their_name}.bias"] = bias
        for kind in ("weight", "bias"):
            parts = [ours[f"model.layers.{idx}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            joined = torch.cat(parts)
            name = f"transformer.h.{idx}.attn.c_attn.{kind}"
            found[name] = joined.T if kind == "weight" else joined
    return found


def test_gpt2_is_transformers_gpt2():
    """Logits and every gradient, fp64: rounding alone (another order of sums)."""
    ours, theirs = twin()
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-10, atol=1e-10)
    loss_sum, count = ours(tokens[:, :-1], tokens[:, 1:])
    (loss_sum / count).backward()
    their_logits = theirs(tokens).logits[:, :-1]  # their own loss would be in fp32
    torch.nn.functional.cross_entropy(
        their_logits.flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    found = theirs_of({name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_gpt2_decodes_as_transformers_gpt2():
    """With both sides' caches, in parts of 5, 1 and 4 tokens; fp64, rounding alone."""
    ours, theirs = twin()
    tokens = torch.randint(0, 61, (2, 10), generator=torch.Generator().manual_seed(4))
    caches, past = ours.new_caches(10), None
    with torch.no_grad():
        for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
            answer = theirs(part, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            logits = ours.logits(part, caches)
            torch.testing.assert_close(logits, answer.logits, rtol=1e-10, atol=1e-10)
