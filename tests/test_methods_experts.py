"""Qwen-3 MoE: routed experts under every parameterization, beside formulas and transformers'."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import architectures, linears
from crnet.config import presets
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, ModelConfig, RunConfig
from crnet.config.serialize import override
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.parameters import num_parameters
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.hub.export import merged
from crnet.kernels.experts import combine, deal, route, take
from crnet.kernels.naive import carried_lowrank
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Expert
from shapes import error, is_legal, make, random_tokens, randomised, tiny

NAME = "qwen3-moe"
OPTIONS: Any = architectures.get(NAME).Options


def small(linear: str = "full", **options: Any) -> ModelConfig:
    changes: dict[str, Any] = {"qwen3_moe": OPTIONS(**options)}
    return tiny(linear=linear, architecture=NAME, **changes)


def gradients(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_sum, _ = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss_sum.backward()
    return {name: it.grad.clone() for name, it in model.named_parameters() if it.grad is not None}


# --- routing --------------------------------------------------------------------------------------


def naive_route(x: Tensor, weight: Tensor, num_active: int, normalises: bool) -> Any:
    """Token by token; how uneven, row by row as the docstring of ``route`` has it."""
    shares = (x @ weight.T).softmax(-1)
    rows, chosen = [], []
    for share in shares.flatten(0, 1):
        order = share.argsort(descending=True)[:num_active]
        rows.append(share[order] / share[order].sum() if normalises else share[order])
        chosen.append(order)
    uneven = torch.zeros((), dtype=x.dtype)
    for share, picks in zip(shares, torch.stack(chosen).chunk(len(x)), strict=True):
        for expert in range(len(weight)):
            through = (picks == expert).sum() / x.shape[1]
            uneven = uneven + x.shape[1] * len(weight) * through * share[:, expert].mean()
    return torch.stack(rows), torch.stack(chosen), uneven


@pytest.mark.parametrize("normalises", [False, True])
def test_routing_is_its_formula(normalises: bool):
    """fp64: weights, choice and evenness; the gradients of input and router from each of them."""
    torch.manual_seed(1)
    x = torch.randn(3, 7, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    weights, chosen, uneven = route(x, weight, 2, normalises)
    expected, expected_chosen, expected_uneven = naive_route(x, weight, 2, normalises)
    assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(uneven, expected_uneven)
    probe = torch.randn(weights.shape, dtype=torch.float64)
    for factor in (0.0, 0.3):
        found = torch.autograd.grad(
            (weights * probe).sum() + factor * uneven, (x, weight), retain_graph=True
        )
        wanted = torch.autograd.grad(
            (expected * probe).sum() + factor * expected_uneven, (x, weight), retain_graph=True
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_the_router_is_fp32_whatever_the_precision():
    """Under autocast, and of bf16 inputs: the bits of fp32 on the same numbers."""
    torch.manual_seed(2)
    x = torch.randn(2, 5, 16).bfloat16()
    weight = torch.randn(4, 16, requires_grad=True)
    found = []
    for autocasts in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            weights, _, uneven = route(x.requires_grad_(), weight, 2, True)
        found.append((weights, *torch.autograd.grad(weights.sum() + uneven, (x, weight))))
    wide = x.detach().float().requires_grad_()
    weights, _, uneven = route(wide, weight, 2, True)
    gradient, weight_gradient = torch.autograd.grad(weights.sum() + uneven, (wide, weight))
    for one in found:
        assert one[0].dtype == torch.float32
        assert torch.equal(one[0], weights)
        assert torch.equal(one[1], gradient.bfloat16())
        assert torch.equal(one[2], weight_gradient)
    spec = model_spec(small())
    assert spec.tensors["model.layers.0.mlp.gate.weight"].dtype == "float32"


def test_rows_come_back_where_they_were():
    """Dealt out, passed through and added up with their weights: fp64, gradients included."""
    torch.manual_seed(3)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(8)[:3] for _ in range(9)])
    dealt = deal(chosen, 8)
    assert dealt.counts == [int((chosen == each).sum()) for each in range(8)]
    rows = take(x, dealt, 3)
    start = 0
    for expert, count in enumerate(dealt.counts):
        tokens = (chosen == expert).any(-1)
        assert torch.equal(rows[start : start + count], x[tokens])
        start += count
    scale = torch.arange(1.0, 9.0, dtype=torch.float64)
    factors = scale.repeat_interleave(torch.tensor(dealt.counts))
    y = combine(rows * factors[:, None], weights, dealt)
    expected = (x[:, None] * (scale[chosen] * weights)[..., None]).sum(1)
    torch.testing.assert_close(y, expected)
    probe = torch.randn(y.shape, dtype=torch.float64)
    found = torch.autograd.grad((y * probe).sum(), (x, weights))
    wanted = torch.autograd.grad((expected * probe).sum(), (x, weights))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_experts_add_up():
    for tokens, count, active in ((7, 3, 2), (16, 4, 4), (5, 8, 1)):
        rows = [Expert(idx, count, active).rows(tokens) for idx in range(count)]
        assert sum(rows) == tokens * active
        assert max(rows) - min(rows) <= 1


# --- the layer ------------------------------------------------------------------------------------


def naive_layers(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits of CR-Net or full rank with experts, attention by the package's own module: the layer
    of experts token by token, its output added to ``gain`` times that of the block below."""
    backbone = model.model
    x = backbone.embed_tokens(tokens)  # type: ignore[operator]
    spec = model.spec
    context = spec.architecture.context(
        spec.shape, spec.architecture_options, 0, tokens.shape[1], tokens.device, None
    )
    below: dict[str, Tensor] = {}
    options = spec.architecture_options

    def dense(linear: Any, rows: Tensor) -> Tensor:
        if hasattr(linear, "weight"):
            return rows @ linear.weight.T
        return rows @ linear.A @ linear.B

    for block in backbone.blocks():
        maps: Any = block.maps
        kept: dict[str, Tensor] = {}

        def project(
            position: str, rows: Tensor, maps: Any = maps, kept: Any = kept, below: Any = below
        ) -> Tensor:
            linear = maps[position]
            if hasattr(linear, "beta"):
                gain = linear.beta + 1e-6 * torch.sign(linear.beta)
                args = (rows, linear.A, linear.B, below[position], gain)
                kept[position] = carried_lowrank(*args)
            else:
                kept[position] = dense(linear, rows)
            return kept[position]

        class Ask:
            __call__ = staticmethod(project)

            @staticmethod
            def attend(mix: Any, *qkv: Tensor) -> Tensor:
                return mix(*qkv)

        norms: Any = block
        x = x + norms.self_attn(norms.input_layernorm(x), Ask(), context)
        normed = norms.post_attention_layernorm(x)
        weights, chosen, _ = naive_route(
            normed, norms.mlp.gate.weight, options.num_active, options.normalises
        )
        rows = []
        for row, picks, shares in zip(normed.flatten(0, 1), chosen, weights, strict=True):
            total = torch.zeros_like(row)
            for expert, share in zip(picks.tolist(), shares, strict=True):
                gate, up = (dense(maps[f"{each}.{expert}"], row) for each in ("gate", "up"))
                act = torch.nn.functional.silu(gate) * up
                total = total + share * dense(maps[f"down.{expert}"], act)
            rows.append(total)
        y = torch.stack(rows).view(x.shape)
        if hasattr(maps["experts"], "beta"):
            beta = maps["experts"].beta
            y = (beta + 1e-6 * torch.sign(beta)) * below["experts"] + y
        kept["experts"] = y
        below = kept
        x = x + y
    return model.lm_head(backbone.norm(x))


@pytest.mark.parametrize("linear", ["full", "lowrank", "crnet"])
@pytest.mark.parametrize("normalises", [True, False])
def test_logits_and_gradients_are_those_of_the_formula(linear: str, normalises: bool):
    """fp64; what CR-Net carries is what the layer of experts gave (E.3)."""
    model = randomised(make(small(linear, num_experts=5, num_active=2, normalises=normalises)))
    tokens = random_tokens(2, 7)
    actual, expected = model.logits(tokens), naive_layers(model, tokens)
    assert error(actual, expected) < 1e-9
    probe = torch.randn(actual.shape, dtype=torch.float64)
    found = {}
    for name, logits in (("actual", actual), ("expected", expected)):
        model.zero_grad()
        (logits * probe).sum().backward()
        found[name] = {
            key: it.grad.clone() for key, it in model.named_parameters() if it.grad is not None
        }
    for key, gradient in found["expected"].items():
        assert error(found["actual"][key], gradient) < 1e-8, key


def test_what_crnet_has_of_a_layer_of_experts():
    """From the second block on: factors of every expert, without a gain; one gain for the layer."""
    spec = model_spec(small("crnet"))
    names = {name.removeprefix("model.layers.1.mlp.") for name in spec.tensors if "s.1.mlp" in name}
    experts = {
        f"experts.{idx}.{kind}_proj.{factor}"
        for idx in range(4)
        for kind in ("gate", "up", "down")
        for factor in "AB"
    }
    assert names == experts | {"gate.weight", "output.beta"}
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in spec.tensors
    assert "model.layers.0.mlp.output.beta" not in spec.tensors
    assert [sorted(read) for read in spec.reads] == [[], *[["experts", "k", "o", "q", "v"]] * 2]


@pytest.mark.parametrize("linear", linears.names())
def test_an_expert_without_a_token(linear: str):
    """Three tokens, nine experts: idle ones have gradients of 0, and no policy changes a bit."""
    config = small(linear, num_experts=9, num_active=2)
    if not is_legal(config):
        pytest.skip("its maps would read a carry")
    model = make(config)
    tokens = random_tokens(1, 4)
    expected = gradients(model, tokens)
    assert expected.keys() == {name for name, each in model.spec.tensors.items() if each.trained}
    last = [f"model.layers.2.mlp.experts.{idx}.down_proj." for idx in range(9)]
    of_last = [
        sum(float(g.abs().sum()) for n, g in expected.items() if n.startswith(p)) for p in last
    ]
    assert of_last.count(0.0) >= 3
    for policy in ("block", "replay"):
        model.recompute(RecomputePlan(policy))
        for name, gradient in gradients(model, tokens).items():
            assert torch.equal(gradient, expected[name]), (policy, name)


def test_a_step_does_not_hang_on_the_micro_batch():
    """Evenness is a matter of a row: two micro-batches give the gradient of one. And the loss that
    is told is the cross-entropy."""
    tokens = random_tokens(4, 9)
    found = {}
    for factor in (0.0, 10.0):
        model = randomised(make(small(balance_factor=factor)))
        whole = gradients(model, tokens)
        parts = [gradients(model, part) for part in tokens.chunk(2)]
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, msg=name)
        args = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        found[factor] = whole, float(model(*args)[0].detach()), float(model.scores(*args).loss_sum)
    assert found[0.0][1] == found[10.0][1] == pytest.approx(found[0.0][2])
    router = "model.layers.1.mlp.gate.weight"
    assert error(found[10.0][0][router], found[0.0][0][router]) > 1e-2


def test_balance_makes_experts_even():
    """Trained for evenness alone, a router that prefers some experts comes to use all."""
    torch.manual_seed(4)
    x = torch.randn(4, 32, 8)
    weight = torch.randn(6, 8) * 0.2
    weight[0] += x.mean((0, 1)) * 20
    weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=2.0)
    seen = []
    for _ in range(60):
        _, _, uneven = route(x, weight, 2, True)
        seen.append(float(uneven.detach()) / (4 * 32 * 2))
        optimizer.zero_grad()
        (uneven / (4 * 32)).backward()
        optimizer.step()
    assert seen[-1] < 1 + 0.7 * (seen[0] - 1)


# --- sizes and costs ------------------------------------------------------------------------------


def test_table_7_has_the_papers_parameters():
    """E.3: 1.8B, of which 650M are active; ours is 1.853B and 642M."""
    for name in ("qwen3-moe-1.8b", "paper/qwen3-moe-1.8b"):
        config = override(presets.get(name), model={"linear": "full", "vocab_size": 151_936})
        spec = model_spec(config.model)
        counts = num_parameters(spec)
        h, f, layers = 1024, 704, 28
        block = 2 * h * 1024 + 2 * h * 512 + 24 * h + 2 * h + 2 * 64
        around = 2 * 151_936 * h + h
        assert counts["total"] == layers * (block + 24 * 3 * h * f) + around
        assert counts["active of them"] == layers * (block + 4 * 3 * h * f) + around
        assert round(counts["total"] / 1e9, 3) == 1.853
        assert round(counts["active of them"] / 1e6) == 642
        check(config)


def test_cost_of_active_experts():
    """FLOPs are those of the experts that tokens go through; state that of all of them."""
    config = RunConfig(model=small(num_experts=8, num_active=2), data=DataConfig(sequence_length=8))
    few = workload(config)
    many = workload(dataclasses.replace(config, model=small(num_experts=16, num_active=2)))
    routers = 3 * 2 * few.micro_batch.rows * 16 * 8
    for one, other in ((few, many),):
        ahead = [
            sum(
                work.forward_flops
                for block in each.micro_batch.blocks
                for work in block.works.values()
            )
            + 3 * each.micro_batch.inside.forward_flops
            for each in (one, other)
        ]
        assert ahead[1] - ahead[0] == routers
    assert many.state_bytes["optimizer state"] - few.state_bytes["optimizer state"] == (
        3 * 8 * ((3 * 16 * 24 + 16) * 8 + 3 * 4)  # two moments; a step counter for each tensor
    )


def test_products_of_a_block_are_what_tokens_go_through():
    micro_batch = MicroBatch(model_spec(small(num_experts=7, num_active=3)), 3, 5)
    works = micro_batch.blocks[1].works
    flops = sum(work.forward_flops for name, work in works.items() if "." in name)
    assert flops == 2 * 15 * 3 * 3 * 16 * 24
    assert works["experts"].forward_flops == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"linear": "lax"}}, "made of other tokens"),
        ({"train": {"recompute": "invert"}}, "invert"),
        ({"train": {"compile": True}}, "--train.compile with qwen3-moe"),
        ({"parallel": {"tensor": 2}}, "--parallel.tensor: qwen3-moe"),
        ({"parallel": {"pipeline": 2}}, "--parallel.pipeline with qwen3-moe"),
        ({"model": {"qwen3_moe": {"num_active": 5}}}, "num-active is 5; take 1 to 4"),
        ({"model": {"qwen3_moe": {"num_experts": 0}}}, "num-experts is 0"),
        ({"model": {"qwen3_moe": {"balance_factor": -1.0}}}, "balance-factor is -1.0"),
        ({"model": {"crnet": {"gain": "head"}}}, "gain head is not there for a layer of experts"),
        ({"model": {"linear": "shared"}}, "not the same experts"),
        ({"model": {"rank": "4/gate.3=2"}}, "known: q, k, v, o, gate, up, down"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str):
    config = RunConfig(model=small("crnet"), data=DataConfig(sequence_length=16))
    with pytest.raises(ConfigError, match=words):
        check(override(config, **changes))


# --- transformers ---------------------------------------------------------------------------------


def theirs_of(config: ModelConfig) -> Any:
    """transformers' own model of these sizes, eager attention, fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    from crnet.hub.names import standard_names

    spec = model_spec(config)
    form = dict(spec.architecture.plain_form(spec.shape, spec.architecture_options) or {})
    assert form.pop("architectures") == ["Qwen3MoeForCausalLM"]
    form.pop("model_type")
    described = transformers.Qwen3MoeConfig(
        **form, **standard_names(config, 64), attn_implementation="eager"
    )
    described._experts_implementation = "eager"  # no other is there in fp64
    return transformers.Qwen3MoeForCausalLM(described).double().eval()


def fused(weights: dict[str, Tensor], num_layers: int, num_experts: int) -> dict[str, Tensor]:
    """Our tensors as transformers holds them in memory: experts stacked, gate above up."""
    found = {name: it for name, it in weights.items() if ".experts." not in name}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"

        def stacked(kind: str, prefix: str = prefix) -> Tensor:
            return torch.stack([weights[f"{prefix}.{i}.{kind}.weight"] for i in range(num_experts)])

        found[f"{prefix}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], 1)
        found[f"{prefix}.down_proj"] = stacked("down_proj")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("normalises", [True, False])
def test_logits_and_gradients_are_those_of_transformers(normalises: bool):
    """fp64, weights copied; transformers computes router, norms and softmax in fp32: 1e-6."""
    config = small(num_experts=6, num_active=3, normalises=normalises, balance_factor=0.0)
    ours, theirs = randomised(make(config)), theirs_of(config)
    own = {name: it.detach() for name, it in ours.named_parameters()}
    theirs.load_state_dict(fused(own, 3, 6), strict=True)
    tokens = random_tokens(2, 9)
    logits, expected = ours.logits(tokens), theirs(tokens, use_cache=False).logits
    assert error(logits, expected) < 1e-5
    probe = torch.randn(logits.shape, dtype=torch.float64)
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    found = fused({name: it.grad for name, it in ours.named_parameters()}, 3, 6)  # type: ignore[misc]
    for name, parameter in theirs.named_parameters():
        assert error(found[name], parameter.grad) < 1e-4, name


@pytest.mark.slow
def test_how_uneven_is_transformers_balance_of_a_row():
    """Its ``load_balancing_loss_func`` of one layer and one row, times the row's tokens."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(5)
    x, weight = torch.randn(3, 11, 8), torch.randn(6, 8)
    expected = sum(load_balancing_loss_func((row @ weight.T,), 6, 2) * 11 for row in x)
    torch.testing.assert_close(route(x, weight, 2, True)[2], expected)


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["full", "lowrank"])
@torch.no_grad()
def test_weights_go_to_transformers_and_come_back(linear: str, tmp_path: Path):
    """A folder with our names opens as ``Qwen3MoeForCausalLM``; what that saves has our names."""
    import safetensors.torch
    import transformers

    config = small(linear, num_experts=6)
    own = randomised(make(config), torch.float32).eval()
    weights = {name: it.contiguous() for name, it in merged(own).items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    theirs_of(config).config.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(found) is transformers.Qwen3MoeForCausalLM
    tokens = random_tokens(2, 9)
    assert error(found(tokens).logits, own.logits(tokens)) < 1e-3
    found.save_pretrained(tmp_path / "back")
    back = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(back[name], value), name


@pytest.mark.slow
def test_trainer_gets_the_balance_too():
    """``crnet.hf``: loss and every gradient are those of the package's own step."""
    import crnet.hf
    from crnet.hub.names import own_names

    config = small("crnet", balance_factor=10.0)
    own = randomised(make(config), torch.float32)
    model = crnet.hf.CRNetForCausalLM(crnet.hf.CRNetConfig(crnet=own_names(config))).train()
    model.load_state_dict(own.state_dict(), strict=True)
    tokens = random_tokens(2, 9)
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    loss_sum, count = own(tokens, targets)
    (loss_sum / count).backward()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert error(loss, loss_sum / count) < 1e-5
    for name, parameter in own.named_parameters():
        assert error(model.get_parameter(name).grad, parameter.grad) < 1e-3, name
