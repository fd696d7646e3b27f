"""Multi-head latent attention beside its formula and transformers', its cache, what CR-Net carries
there, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import architectures, linears
from crnet.architectures.mla import sizes_of
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import DataConfig, ModelConfig, RunConfig
from crnet.config.serialize import override
from crnet.cost.micro_batch import MicroBatch
from crnet.cost.parameters import num_parameters
from crnet.errors import ConfigError
from crnet.hub.export import merged
from crnet.model.language_model import LanguageModel
from shapes import TINY, error, is_legal, make, random_tokens, randomised, tiny
from test_methods_cli import Choice
from test_methods_cli import test_a_run as run_and_resume
from test_train import run
from test_train import tiny as tiny_run

OPTIONS: Any = architectures.get("mla").Options
CASES: dict[str, dict[str, Any]] = {
    "queries of the input": {},
    "queries of a latent": {"q_lora_rank": 6, "kv_lora_rank": 10},
    "narrow values": {"q_lora_rank": 5, "qk_nope_head_dim": 2, "v_head_dim": 3},
    "values as wide as keys": {"qk_nope_head_dim": 2, "qk_rope_head_dim": 4, "v_head_dim": 6},
}
each_case = pytest.mark.parametrize("case", CASES)


def small(linear: str = "full", *, num_heads: int = 4, **options: Any) -> ModelConfig:
    changes: dict[str, Any] = {"mla": OPTIONS(**options), "num_kv_heads": None}
    return tiny(linear=linear, architecture="mla", num_heads=num_heads, **changes)


# --- formulas -------------------------------------------------------------------------------------


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def turned(x_TP: Tensor) -> Tensor:
    """Items i and i + P / 2 as a complex number, times exp(i t theta^(-2 i / P))."""
    first, second = x_TP.chunk(2, -1)
    powers = torch.arange(first.shape[-1], dtype=torch.float64) / first.shape[-1]
    times = torch.arange(len(x_TP), dtype=torch.float64)[:, None]
    # The package's tables are fp32.
    angles = (times.float() * TINY.rope_theta ** -powers.float()).float()
    factors = torch.complex(angles.cos().double(), angles.sin().double())
    product = torch.complex(first, second) * factors
    return torch.cat([product.real, product.imag], -1)


def naive_attention(maps: Any, x_TD: Tensor, gains: dict[str, Tensor], sizes: Any) -> Tensor:
    """One row, head by head and token by token. ``maps``: position -> function of rows."""
    if sizes.q_latent:
        queries = maps("q_b", norm(maps("q_a", x_TD), gains["q_a"], 1e-6))
    else:
        queries = maps("q", x_TD)
    both = maps("kv_a", x_TD)
    shared = turned(both[:, sizes.kv_latent :])
    kv = maps("kv_b", norm(both[:, : sizes.kv_latent], gains["kv_a"], 1e-6))
    heads = kv.split(sizes.nope + sizes.value, -1)
    pairs, mixed = zip(queries.split(sizes.head, -1), heads, strict=True), []
    for query, own in pairs:
        turned_query = turned(query[:, sizes.nope :])
        rows = []
        for t in range(len(x_TD)):
            scores = own[: t + 1, : sizes.nope] @ query[t, : sizes.nope]
            scores = (scores + shared[: t + 1] @ turned_query[t]) / sizes.head**0.5
            rows.append(scores.softmax(0) @ own[: t + 1, sizes.nope :])
        mixed.append(torch.stack(rows))
    return maps("o", torch.cat(mixed, -1))


def naive_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Of a model of full rank, or of CR-Net's: ``Y_l = (gain) Y_{l-1} + X_l A_l B_l`` at every
    position, from the second block on."""
    spec, parameters = model.spec, dict(model.named_parameters())
    sizes = sizes_of(spec.shape, spec.architecture_options)
    eps = spec.shape.norm_eps
    logits = []
    for row in tokens:
        x_TD = parameters["model.embed_tokens.weight"][row]
        below: dict[str, Tensor] = {}
        for idx in range(spec.num_layers):
            prefix = f"model.layers.{idx}"

            def maps(
                position: str, x: Tensor, prefix: str = prefix, below: dict[str, Tensor] = below
            ) -> Tensor:
                name = f"{prefix}.{spec.position_of[position].module}"
                if f"{name}.weight" in parameters:
                    y = x @ parameters[f"{name}.weight"].T
                else:
                    beta = parameters[f"{name}.beta"]
                    gain = beta.sign() * (beta.abs() + 1e-6)
                    product = x @ parameters[f"{name}.A"] @ parameters[f"{name}.B"]
                    y = gain * below[position] + product
                below[position] = y
                return y

            at = f"{prefix}.self_attn"
            gains = {n: parameters.get(f"{at}.{n}_layernorm.weight") for n in ("q_a", "kv_a")}
            normed = norm(x_TD, parameters[f"{prefix}.input_layernorm.weight"], eps)
            x_TD = x_TD + naive_attention(maps, normed, gains, sizes)  # type: ignore[arg-type]
            normed = norm(x_TD, parameters[f"{prefix}.post_attention_layernorm.weight"], eps)
            gate, up = maps("gate", normed), maps("up", normed)
            x_TD = x_TD + maps("down", torch.nn.functional.silu(gate) * up)
        normed = norm(x_TD, parameters["model.norm.weight"], eps)
        logits.append(normed @ parameters["lm_head.weight"].T)
    return torch.stack(logits)


@pytest.mark.parametrize("linear", ["full", "crnet"])
@each_case
def test_logits_and_gradients_are_those_of_the_formula(linear: str, case: str):
    """fp64: rounding alone."""
    model, tokens = randomised(make(small(linear, **CASES[case]))), random_tokens(2, 7)
    logits, expected = model.logits(tokens), naive_logits(model, tokens)
    assert error(logits, expected) < 1e-10
    probe = torch.randn(logits.shape, dtype=torch.float64)
    parameters = [it for it in model.parameters() if it.requires_grad]
    found = torch.autograd.grad((logits * probe).sum(), parameters)
    wanted = torch.autograd.grad((expected * probe).sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-8


# --- what CR-Net is here --------------------------------------------------------------------------


def test_every_map_is_a_position_that_carries():
    """From the second block on, each its own output and as wide as that; so invert is there."""
    spec = model_spec(small("crnet", q_lora_rank=6))
    names = ["q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down"]
    assert [each.name for each in spec.positions] == names
    assert not spec.reads[0]
    for block, slots in zip(spec.reads[1:], spec.slots[1:], strict=True):
        widths = {slot.position: slot.out_size for slot in slots}
        assert {name: read.width for name, read in block.items()} == widths
        assert all((read.source, read.of) == ("below", "output") for read in block.values())


def test_the_carry_at_the_latents_costs_what_they_are_wide():
    """Left out at q_a and kv_a: fewer outputs kept, of their widths, beside what norms keep."""
    widths = {"q_a": 6, "kv_a": 16 + 2}
    every, some = (
        MicroBatch(model_spec(dataclasses.replace(small("crnet", q_lora_rank=6), **more)), 2, 8)
        for more in ({}, {"crnet": linears.get("crnet").Options(carries="q_b,kv_b,o,gate,up,down")})
    )
    for name, width in widths.items():
        assert every.blocks[1].outputs[name] == 4 * 16 * width
    saved = every.blocks[1].carries - some.blocks[1].carries
    assert saved == 4 * 16 * sum(widths.values())


def test_ranks_are_given_position_by_position():
    spec = model_spec(dataclasses.replace(small("crnet", q_lora_rank=6), rank="4/q_a=2/kv_a=3"))
    ranks = {slot.position: slot.rank for slot in spec.slots[1]}
    assert ranks == dict.fromkeys(ranks, 4) | {"q_a": 2, "kv_a": 3}


def test_gains_of_heads_are_those_of_the_maps_that_have_heads():
    options = linears.get("crnet").Options(gain="head")
    spec = model_spec(dataclasses.replace(small("crnet", q_lora_rank=6), crnet=options))
    sizes = {slot.position: spec.map_tensors(slot)["beta"].shape for slot in spec.slots[1]}
    assert {name: size for name, size in sizes.items() if size != (1,)} == {
        "q_b": (4,),
        "kv_b": (4,),
    }


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", architectures.names())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_a_cache_takes_what_is_said(architecture: str, precision: Any):
    """Bytes, exact, in every architecture."""
    config = tiny(architecture=architecture)
    if not is_legal(config):
        config = dataclasses.replace(config, num_kv_heads=None)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = make(config, dtype=dtype).eval()
    caches = model.new_caches(9)
    model.logits(random_tokens(1, 4), caches)
    micro_batch = MicroBatch(model.spec, 1, 9, precision)
    assert sum(cache.num_bytes for cache in caches) == micro_batch.cache_bytes


def test_a_cache_holds_the_latent_and_one_rotary_key():
    """Numbers a token and block, however many heads there are."""
    for num_heads in (4, 8):
        config = small(num_heads=num_heads, kv_lora_rank=10, qk_rope_head_dim=6)
        assert MicroBatch(model_spec(config), 1, 1).cache_bytes == 3 * 4 * (10 + 6)
    assert MicroBatch(model_spec(tiny(num_kv_heads=None)), 1, 1).cache_bytes == 3 * 4 * 2 * 16


@pytest.mark.parametrize("linear", [name for name in linears.names() if is_legal(small(name))])
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(linear: str):
    """fp64, values filled up; carries of all tokens come from what the caches hold."""
    model = randomised(make(small(linear, q_lora_rank=6, kv_lora_rank=10, v_head_dim=3))).eval()
    tokens = random_tokens(2, 9)
    caches = model.new_caches(9)
    parts = [model.logits(part, caches) for part in tokens.split([3, 1, 1, 4], dim=1)]
    assert error(torch.cat(parts, 1), model.logits(tokens)) < 1e-10


# --- costs ----------------------------------------------------------------------------------------


def test_parameters_are_counted_by_position():
    """The preset's: products of widths, and a norm for each latent."""
    from crnet.config.presets import PRESETS

    model = PRESETS["mla-130m"][1].model
    full = dataclasses.replace(model, linear="full", vocab_size=32_000)
    counts = num_parameters(model_spec(full))
    heads, h = 12, 768
    wanted = {
        "q_a": h * 384,
        "q_b": 384 * heads * (64 + 32),
        "kv_a": h * (256 + 32),
        "kv_b": 256 * heads * (64 + 64),
        "o": heads * 64 * h,
    }
    assert {name: counts[name] for name in wanted} == {n: 12 * size for n, size in wanted.items()}
    assert counts["norms"] == 12 * (2 * h + 384 + 256) + h


def test_attention_of_a_step_counts_filled_values():
    from crnet.config.presets import PRESETS
    from crnet.cost.step import step_flops
    from crnet.cost.workload import workload
    from crnet.recompute.plan import RecomputePlan

    found = step_flops(workload(PRESETS["mla-130m"][1]), RecomputePlan())
    pairs = 512 * 256 * 256 * 12 * 12
    assert found["attention"] == 3 * 4 * pairs * (64 + 32)
    assert found["attention if causal"] == 3 * 4 * (64 + 32) * pairs * 257 // 512


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"num_kv_heads": 2}}, "--model.num-kv-heads 2 differs .* one latent"),
        ({"model": {"mla": {"q_lora_rank": -1}}}, "q-lora-rank is -1; take 1 or more, or 0"),
        ({"model": {"mla": {"kv_lora_rank": 0}}}, "kv-lora-rank is 0; take 1 or more"),
        ({"model": {"mla": {"qk_nope_head_dim": 0}}}, "qk-nope-head-dim is 0"),
        (
            {"model": {"mla": {"qk_nope_head_dim": 3}}},
            "dim is 3; .* even width: take 4",
        ),
        ({"model": {"mla": {"v_head_dim": 0}}}, "v-head-dim is 0"),
        ({"model": {"mla": {"qk_rope_head_dim": 3}}}, "qk-rope-head-dim is 3; .* an even number"),
        ({"model": {"mla": {"qk_rope_head_dim": 0}}}, "qk-rope-head-dim is 0"),
        ({"model": {"mla": {"v_head_dim": 7}}}, "v-head-dim 7 is above the 6 .* take 6 or less"),
        ({"model": {"mla": {"q_lora_rank": 3}}}, "rank 4 to q_a, q_b .* smaller width there, 3"),
        ({"model": {"rank": "4/k=2"}}, "'k' is no position; known: q, kv_a, kv_b, o, gate"),
        ({"model": {"linear": "value-resformer"}}, "a position v, and this architecture has none"),
        ({"parallel": {"tensor": 2}}, "--parallel.tensor: mla does not say by which side"),
        ({"model": {"architecture": "llama"}}, ""),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: str):
    config = RunConfig(model=small("crnet"), data=DataConfig(sequence_length=16))
    if not words:
        check(override(config, **changes))
        return
    with pytest.raises(ConfigError, match=words):
        check(override(config, **changes))


def test_options_of_another_architecture_are_refused():
    config = dataclasses.replace(small(kv_lora_rank=8), architecture="llama")
    with pytest.raises(ConfigError, match="kv-lora-rank has no effect: llama"):
        check(RunConfig(model=config))


@pytest.mark.slow
def test_transformers_deepseek_is_not_converted():
    from crnet.convert import convert_linears

    with pytest.raises(ConfigError, match=r"makes keys and values of a latent .* seven maps"):
        convert_linears(theirs_of(small()), rank=4)


@pytest.mark.slow
@torch.no_grad()
def test_an_engine_with_heads_of_another_width_is_refused():
    """They read ``head_dim``, which is the width of a query."""
    import crnet.hf
    from crnet.hub.names import own_names

    class Instance:
        num_heads, head_size = 4, 4

    model = crnet.hf.CRNetForCausalLM(crnet.hf.CRNetConfig(crnet=own_names(small()))).model
    assert model.config.head_dim == 6
    words = {"use_cache": False, "attention_instances": dict.fromkeys(range(3), Instance())}
    with pytest.raises(ConfigError, match="queries and keys are 6 wide"):
        model(input_ids=random_tokens(1, 9), **words)


# --- transformers ---------------------------------------------------------------------------------


def theirs_of(config: ModelConfig, **changes: Any) -> Any:
    """transformers' own model of these sizes, no block of experts, eager attention, fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    from crnet.hub.names import standard_names

    spec = model_spec(config)
    form = dict(spec.architecture.plain_form(spec.shape, spec.architecture_options) or {})
    assert form.pop("architectures") == ["DeepseekV3ForCausalLM"]
    described = {**standard_names(config, 64), **form, **changes}
    described.pop("model_type")
    kind = transformers.DeepseekV3Config
    return transformers.DeepseekV3ForCausalLM(
        kind(**described, attn_implementation="eager")
    ).double()


@pytest.mark.slow
@each_case
def test_logits_and_gradients_are_those_of_transformers(case: str):
    """Weights copied, fp64. transformers rounds norms and softmax to fp32: a few times 1e-7."""
    config = dataclasses.replace(small(**CASES[case]), norm_eps=1e-5)
    ours, theirs = randomised(make(config)), theirs_of(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = random_tokens(2, 9)
    logits, expected = ours.logits(tokens), theirs(tokens, use_cache=False).logits
    assert error(logits, expected) < 5e-6
    probe = torch.randn(logits.shape, dtype=torch.float64)
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients = {each: parameter.grad for each, parameter in theirs.named_parameters()}
    for each, parameter in ours.named_parameters():
        assert error(parameter.grad, gradients[each]) < 5e-5, each
    caches, past = ours.new_caches(9), None
    with torch.no_grad():
        for part in tokens.split([5, 1, 3], dim=1):
            answer = theirs(part, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            assert error(ours.logits(part, caches), answer.logits) < 5e-6


@pytest.mark.slow
@torch.no_grad()
def test_neighbours_that_rotate_are_rows_in_another_order():
    """transformers' ``rope_interleave``, which released weights have: the same function."""
    config = small(q_lora_rank=6, qk_rope_head_dim=6)
    ours = randomised(make(config)).eval()
    sizes = sizes_of(ours.spec.shape, ours.spec.architecture_options)
    theirs = theirs_of(config, rope_interleave=True).eval()
    apart = torch.arange(sizes.rope).view(2, -1).T.flatten()  # 0, 3, 1, 4, 2, 5
    weights = {name: it.clone() for name, it in ours.state_dict().items()}
    for name, weight in weights.items():
        if name.endswith("q_b_proj.weight"):
            heads = weight.view(-1, sizes.head, weight.shape[1])
            heads[:, sizes.nope :] = heads[:, sizes.nope :][:, apart]
        if name.endswith("kv_a_proj_with_mqa.weight"):
            weight[sizes.kv_latent :] = weight[sizes.kv_latent :][apart]
    theirs.load_state_dict(weights, strict=True)
    tokens = random_tokens(2, 9)
    assert error(ours.logits(tokens), theirs(tokens, use_cache=False).logits) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", ["queries of the input", "narrow values"])
@torch.no_grad()
def test_in_transformers(case: str, tmp_path: Path):
    """``crnet.hf``: logits of the whole row, token by token with its cache, after a reload."""
    import transformers

    import crnet.hf
    from crnet.hub.names import own_names

    config = small("crnet", **CASES[case])
    own = randomised(make(config), torch.float32).eval()
    model = crnet.hf.CRNetForCausalLM(crnet.hf.CRNetConfig(crnet=own_names(config))).eval()
    model.load_state_dict(own.state_dict(), strict=True)
    tokens = random_tokens(2, 9)
    wanted = own.logits(tokens)
    assert error(model(tokens).logits, wanted) < 1e-5
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    past, found = None, []
    for part in tokens.split([4, 1, 1, 3], dim=1):
        answer = back(part, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        found.append(answer.logits)
    assert error(torch.cat(found, 1), wanted) < 1e-5


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("linear", "precision", "policy"),
    [("crnet", "bf16-mixed", "replay"), ("crnet", "fp32", "invert"), ("full", "fp32", "block")],
)
def test_a_run(linear: str, precision: str, policy: str, corpus: Path, tmp_path: Path, capsys: Any):
    """Trained, resumed to the same bits, evaluated; generates with a cache what it does without."""
    choice = Choice(linear, "residual", "mla", "adamw", "cosine", precision, policy)
    run_and_resume(choice, corpus, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["full", "lowrank"])
def test_a_run_goes_to_transformers(linear: str, corpus: Path, tmp_path: Path):
    """``crnet export --to hf-llama``: ``DeepseekV3ForCausalLM`` opens it, with the same logits."""
    import transformers

    from crnet.hub.export import export_plain
    from crnet.inference.load import load_model
    from crnet.storage import checkpoint

    changes = {"architecture": "mla", "linear": linear, "mla": {"q_lora_rank": 8}}
    saved = checkpoint.load(run(tiny_run(corpus, model=changes), tmp_path / "run").checkpoint)
    export_plain(saved, tmp_path / "plain")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(found) is transformers.DeepseekV3ForCausalLM
    own = load_model(saved).eval()
    assert {name for name, _ in found.named_parameters()} == merged(own).keys()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert error(found(tokens).logits, own.logits(tokens)) < 1e-4
