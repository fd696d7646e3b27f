"""The language model: against transformers' LLaMA, against eq. 6 written out, and its own promises.

Errors are relative to the largest item of the reference; each tolerance is named where it is used.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crnet import linears
from crnet.config import presets
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import ModelConfig
from crnet.layers import attention
from crnet.layers.projector import Projector
from crnet.linears import Parameterization
from crnet.linears._maps import LinearMap
from crnet.linears.crnet import CRNetOptions
from crnet.linears.lowrank import LowRankOptions
from crnet.model.build import build, fill, initial_values, lay_out
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of
from crnet.specs import OWN, TensorSpec, Work, constant
from shapes import TINY, error, make, may_differ, one_of_every_method, random_tokens, tiny
from shapes import randomised as far_from_start

FP64 = 1e-12
"""Sums of at most 100 items in another order, through three blocks and back."""

SHAPES = {
    "full-mha": tiny(linear="full", num_kv_heads=None),
    "full-mqa": tiny(linear="full", num_kv_heads=1),
    "lowrank": tiny(linear="lowrank"),
    "crnet-by-position": tiny(rank="4,5/k=2/down=0.5h"),
    "crnet-first-lowrank-mha": tiny(num_kv_heads=None, crnet=CRNetOptions(first_rank=3)),
    "resformer": tiny(linear="resformer"),
}
"""LLaMA's block, with which the equations below are written."""
each_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)

METHODS = one_of_every_method()
each_method = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


def randomised(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LanguageModel:
    return far_from_start(make(config), dtype)


# --- 1. transformers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def llama(transformers: ModuleType, config: ModelConfig) -> nn.Module:
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads or config.num_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=bool(config.tie_embeddings),
            attn_implementation="sdpa",
        )
    )
    return theirs.train()


def norm_without_rounding(self: nn.Module, x: Tensor) -> Tensor:
    """``LlamaRMSNorm.forward`` without its casts to fp32 and back."""
    variance = x.pow(2).mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


@pytest.mark.parametrize(
    ("kv_heads", "tied", "theta", "rounds_norms"),
    [
        (None, False, 10_000.0, True),
        (2, True, 500_000.0, True),
        (1, False, 500_000.0, False),
        (2, False, 10_000.0, False),
        (None, True, 10_000.0, False),
    ],
)
def test_equals_transformers(
    transformers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int | None,
    tied: bool,
    theta: float,
    rounds_norms: bool,
):
    """Logits and all gradients, fp64, several lengths.

    As it stands, transformers brings every norm's output to fp32 whatever the dtype: seven norms
    times 2^-24 = 4e-7 forward, and a few times that for gradients small beside those they stem
    from. Without that cast 1e-8: the rotary angles are fp32 on both sides, by two formulas that may
    differ in the last place.
    Over one token attention is the identity: the queries' and keys' gradients are zero, to 1e-14.
    """
    tolerance, grad_tolerance = (1e-6, 4e-6) if rounds_norms else (1e-8, 1e-8)
    if not rounds_norms:
        norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
        monkeypatch.setattr(norm, "forward", norm_without_rounding)
    config = tiny(linear="full", num_kv_heads=kv_heads, tie_embeddings=tied, rope_theta=theta)
    ours = make(config).double()
    theirs = llama(transformers, config).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ours.parameters():  # their norms' gains are 1
            parameter.normal_(0.1, 0.4, generator=generator)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours_named, theirs_named = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert ours_named.keys() == theirs_named.keys()
    for length in (1, 2, 7, 16):
        tokens = random_tokens(2, length)
        probe = torch.randn(2, length, 31, generator=generator, dtype=torch.float64)
        expected = theirs(tokens, use_cache=False).logits
        logits = ours.logits(tokens)
        assert error(logits, expected) < tolerance
        (logits * probe).sum().backward()
        (expected * probe).sum().backward()
        for name, parameter in ours_named.items():
            grad, expected_grad = parameter.grad, theirs_named[name].grad
            assert grad is not None
            if length == 1 and ("q_proj" in name or "k_proj" in name):
                assert expected_grad is not None
                assert max(float(g.abs().max()) for g in (grad, expected_grad)) < 1e-14
            else:
                assert error(grad, expected_grad) < grad_tolerance, (name, length)
        ours.zero_grad()
        theirs.zero_grad()


def test_names_and_shapes_are_transformers(transformers: ModuleType):
    config = tiny(linear="full")
    theirs = {n: p.shape for n, p in llama(transformers, config).state_dict().items()}
    assert {n: p.shape for n, p in make(config).state_dict().items()} == theirs


# --- 2. equation 6 ------------------------------------------------------------------------------


def by_equation(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits of one row of tokens, from the paper's equations, one position and head at a time."""
    config, p = model.spec.config, dict(model.named_parameters())
    h = config.hidden_size
    head_size = h // config.num_heads
    kv_heads = config.num_kv_heads or config.num_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (
            torch.stack([row / (row.pow(2).mean() + config.norm_eps).sqrt() for row in x]) * weight
        )

    def rotated(x: Tensor) -> Tensor:
        """One head's rows: pair (i, i + H/2) of row t turned by t theta^(-2i/H), angles in fp32."""
        rows = []
        for t, row in enumerate(x):
            out = [row[0]] * head_size
            for i in range(head_size // 2):
                j = i + head_size // 2
                angle = torch.tensor(float(t)) * config.rope_theta ** -torch.tensor(
                    2.0 * i / head_size
                )
                cos, sin = float(angle.cos()), float(angle.sin())
                out[i] = row[i] * cos - row[j] * sin
                out[j] = row[j] * cos + row[i] * sin
            rows.append(torch.stack(out))
        return torch.stack(rows)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for n in range(config.num_heads):
            m = n // (config.num_heads // kv_heads)
            at = slice(n * head_size, (n + 1) * head_size)
            kv_at = slice(m * head_size, (m + 1) * head_size)
            q_n, k_m, v_m = rotated(q[:, at]), rotated(k[:, kv_at]), v[:, kv_at]
            rows = []
            for t in range(len(q)):
                scores = (k_m[: t + 1] @ q_n[t]) / math.sqrt(head_size)
                rows.append(torch.softmax(scores, dim=0) @ v_m[: t + 1])
            heads.append(torch.stack(rows))
        return torch.cat(heads, dim=1)

    x = p["model.embed_tokens.weight"][tokens]
    below: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    for idx in range(config.num_layers):
        prefix = f"model.layers.{idx}."
        y: dict[str, Tensor] = {}

        def apply(position: str, x: Tensor, prefix=prefix, y=y, below=below, first=first) -> Tensor:
            part = "self_attn" if position in "qkvo" else "mlp"
            name = f"{prefix}{part}.{position}_proj."
            if name + "weight" in p:
                y[position] = x @ p[name + "weight"].T
            else:
                y[position] = x @ p[name + "A"] @ p[name + "B"]
            if name + "beta" in p:
                beta = p[name + "beta"]
                gain = torch.sign(beta) * (beta.abs() + 1e-6)
                earlier = first if config.linear == "resformer" else below
                y[position] = gain * earlier[position] + y[position]
            return y[position]

        normed = norm(x, p[prefix + "input_layernorm.weight"])
        q, k, v = (apply(position, normed) for position in "qkv")
        x = x + apply("o", attention(q, k, v))
        normed = norm(x, p[prefix + "post_attention_layernorm.weight"])
        gate, up = apply("gate", normed), apply("up", normed)
        x = x + apply("down", gate / (1 + torch.exp(-gate)) * up)
        below, first = y, first or y
    return norm(x, p["model.norm.weight"]) @ p["lm_head.weight"].T


@each_shape
def test_equals_the_equations(config: ModelConfig):
    """Logits and every gradient, betas included, fp64: FP64, as sums run in another order."""
    model = randomised(config)
    tokens = random_tokens(2, 6)
    probe = torch.randn(2, 6, 31, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model.logits(tokens)
    grads = torch.autograd.grad(logits, parameters, probe)
    expected = torch.stack([by_equation(model, row) for row in tokens])
    expected_grads = torch.autograd.grad(expected, parameters, probe)
    assert error(logits, expected) < FP64
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < FP64, name
    betas = [name for name in names if name.endswith(".beta")]
    assert len(betas) == (14 if config.linear in ("crnet", "resformer") else 0)


def test_rotary_tables():
    """Against fp64 angles. An angle is rounded three times (exponent, power, product) in fp32, and
    one of up to 300 radians errs by 3 x 300 x 2^-24 = 5e-5. Any window is a slice of the whole."""
    whole = attention.rope(0, 300, 8, 10_000.0, torch.device("cpu"))
    exponents = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    angles = torch.outer(torch.arange(300, dtype=torch.float64), 10_000.0**-exponents)
    assert whole.cos.shape == whole.sin.shape == (300, 1, 4)
    assert float((whole.cos[:, 0] - angles.cos()).abs().max()) < 5e-5
    assert float((whole.sin[:, 0] - angles.sin()).abs().max()) < 5e-5
    for start, length in ((0, 1), (1, 1), (63, 2), (64, 1), (255, 2), (299, 1)):
        part = attention.rope(start, length, 8, 10_000.0, torch.device("cpu"))
        assert torch.equal(part.cos, whole.cos[start : start + length])
        assert torch.equal(part.sin, whole.sin[start : start + length])


# --- 3. causality -------------------------------------------------------------------------------


@each_method
def test_causality(config: ModelConfig):
    """Another token t leaves logits before t bit-identical and changes those at t and most after
    it: a random model's attention may give it no weight at one of them. With experts within
    rounding, in fp64 (``shapes.may_differ``)."""
    limit = may_differ(config)
    model = randomised(config, torch.float64 if limit else torch.float32)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        logits = model.logits(tokens)
        for t in (0, 1, 5, 8):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 31
            moved_BT = (model.logits(changed) - logits).abs().amax(dim=-1)
            assert bool((moved_BT[:, :t] <= limit).all())
            assert bool((moved_BT[:, t] > limit).all())
            assert float((moved_BT[:, t:] > limit).float().mean()) > 0.8


# --- 4. the list of tensors ---------------------------------------------------------------------


def assert_listed(spec: ModelSpec, model: LanguageModel, dtype: torch.dtype) -> None:
    """Names, shapes, dtypes and what is trained, as the specification lists them."""
    dtypes = {"model": dtype, "float32": torch.float32, "int32": torch.int32}
    actual = {
        name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()
    }
    assert actual == {
        name: (tensor.shape, dtypes[tensor.dtype], tensor.trained)
        for name, tensor in spec.tensors.items()
    }
    assert list(model.buffers()) == []  # none that a build on meta could leave as garbage


@each_method
@pytest.mark.parametrize("tied", [False, True])
def test_the_list_is_the_model(config: ModelConfig, tied: bool):
    config = dataclasses.replace(config, tie_embeddings=tied)
    for dtype in (torch.float32, torch.bfloat16):
        model = make(config, dtype=dtype)
        assert_listed(model.spec, model, dtype)
        assert ("lm_head.weight" in model.spec.tensors) != tied
        trained = model.trained()
        assert trained.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        for name, (tensor, parameter) in trained.items():
            assert tensor is model.spec.tensors[name]
            assert parameter is model.get_parameter(name)


def counted(preset: str, linear: str) -> ModelConfig:
    config = presets.get(preset)
    model = dataclasses.replace(config.model, linear=linear, vocab_size=config.data.vocab_size)
    published = linears.get(linear).published_ranks.get("aligned-parameters", {})
    if (model.hidden_size, model.num_layers) not in published:
        model = dataclasses.replace(model, rank="0.25h")
    return model


@pytest.mark.parametrize(
    ("preset", "linear"),
    [*zip(presets.PRESETS, itertools.cycle(["crnet", "lowrank"]), strict=False)],
)
def test_the_list_of_every_preset(preset: str, linear: str):
    """Every name and shape, of a model laid out without memory."""
    spec = model_spec(counted(preset, linear))
    assert_listed(spec, lay_out(spec), torch.float32)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("llama-60m", 58_073_600),
        ("llama-130m", 134_105_856),
        ("llama-350m", 367_969_280),
        ("llama-1b", 1_339_082_752),
        ("llama-7b", 6_738_415_616),
    ],
)
def test_full_rank_totals(preset: str, expected: int):
    """The GaLore family's models, as its papers count them."""
    tensors = model_spec(counted(preset, "full")).tensors
    assert sum(tensor.num_items for tensor in tensors.values()) == expected


# --- 5. the loss --------------------------------------------------------------------------------


@each_method
def test_loss_is_summed_cross_entropy(config: ModelConfig):
    """Of the logits, FP64; padding carries no loss; the count is exact."""
    model = randomised(config)
    tokens, targets = random_tokens(3, 7), random_tokens(3, 7, seed=9)
    each = nn.functional.cross_entropy(
        model.logits(tokens).flatten(0, 1), targets.flatten(), reduction="none"
    ).view(3, 7)
    loss, count = model(tokens, targets)
    assert loss.shape == count.shape == ()
    assert loss.dtype == torch.float64
    assert count.dtype == torch.int64
    assert count.item() == 21
    assert error(loss, each.sum()) < FP64

    padded = targets.clone()
    padded[1, 4:] = padded[2] = -100
    loss, count = model(tokens, padded)
    assert count.item() == 7 + 4
    assert error(loss, each[0].sum() + each[1, :4].sum()) < FP64

    loss, count = model(tokens, torch.full_like(targets, -100))
    assert (loss.item(), count.item()) == (0.0, 0)


@each_method
def test_sums_add_up_over_micro_batches(config: ModelConfig):
    """Unevenly padded micro-batches give the whole batch's loss, count and gradients: FP64,
    of a bias relative to all biases' (that of keys has no gradient, as softmax ignores it)."""
    model = randomised(config)
    tokens, targets = random_tokens(4, 7), random_tokens(4, 7, seed=9)
    targets[0, 2:] = targets[3, :5] = -100
    loss, count = model(tokens, targets)
    loss.backward()
    expected = {name: p.grad for name, (_, p) in model.trained().items()}
    model.zero_grad()
    parts = [model(t, g) for t, g in zip(tokens.split(1), targets.split(1), strict=True)]
    for part, _ in parts:
        part.backward()
    assert sum(int(n) for _, n in parts) == int(count) == 2 + 7 + 7 + 2
    assert error(torch.stack([part for part, _ in parts]).sum(), loss) < FP64
    biases = [name for name in expected if name.endswith(".bias")]
    if biases:
        pairs = [(model.get_parameter(name).grad, expected[name]) for name in biases]
        actual, wanted = (torch.cat(grads) for grads in zip(*pairs, strict=True))  # type: ignore[arg-type]
        assert error(actual, wanted) < FP64
    for name in expected.keys() - {*biases}:
        # Maps that scale their product up, at this rank, sharpen attention: a digit is less.
        assert error(model.get_parameter(name).grad, expected[name]) < 10 * FP64, name


# --- 6. building --------------------------------------------------------------------------------


def state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in make(config, seed).named_parameters()}


@each_method
def test_seed_decides_every_bit(config: ModelConfig):
    before = torch.get_rng_state()
    first, second, other = state(config), state(config), state(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the global one is left alone
    assert first.keys() == second.keys() == other.keys()
    tensors = model_spec(config).tensors
    for name in first:
        assert torch.equal(first[name], second[name]), name
        if tensors[name].init.kind in ("normal", "uniform"):
            assert not torch.equal(first[name], other[name]), name


def test_every_bit_of_the_seed_counts():
    """Also above 64 and below 0; and words do not run into each other."""
    seeds = (0, 1, 2**32, 2**32 + 1, 2**33, 2**64, 2**64 + 1, -1)
    drawn = {float(torch.rand((), generator=generator_of(seed, "a", "b"))) for seed in seeds}
    drawn |= {float(torch.rand((), generator=generator_of(0, *it))) for it in ("ab", ("ab",))}
    drawn |= {float(torch.rand((), generator=generator_of(0, "b", "a")))}
    assert len(drawn) == len(seeds) + 2
    low, high = (dict(initial_values(model_spec(TINY), seed)) for seed in (1, 2**32 + 1))
    assert not torch.equal(low["lm_head.weight"], high["lm_head.weight"])


def test_a_parameter_starts_alike_whatever_else_a_model_has():
    """Of all models, with more blocks too: what has one name and one declaration has the same bits;
    embedding, head and first block among it, so that comparisons start alike. What a method draws
    itself also hangs on the method and the sizes of the map."""
    seen: dict[tuple[str, TensorSpec, Any], Tensor] = {}
    num_shared = 0
    deeper = {f"{name}-deeper": tiny(linear=name, num_layers=5) for name in linears.names()}
    for config in (METHODS | deeper | SHAPES).values():
        spec = model_spec(config)
        for name, value in initial_values(spec, seed=3):
            tensor = spec.tensors[name]
            drawn_by = None
            if tensor.init is OWN:
                slot = spec.slot_of[name.rpartition(".")[0]]
                drawn_by = config.linear, slot.in_size, slot.out_size
            known = seen.setdefault((name, tensor, drawn_by), value)
            num_shared += known is not value
            assert torch.equal(known, value), name
    assert num_shared > len(seen)


def test_values_have_the_declared_deviation():
    """2%: more than three deviations of a deviation of 64 x 256 items (1 / sqrt(2 x 16384) =
    0.55%); of fewer items n five, 5 / sqrt(2 n). A mean is off by four of its own at most. A dense
    Gaussian has --model.init-std."""
    widths = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 256, "rank": "16"}
    for config in METHODS.values():
        wide = dataclasses.replace(config, **widths, init_std=0.05)
        spec = model_spec(wide)
        for name, value in initial_values(spec, seed=0):
            init, count = spec.tensors[name].init, spec.tensors[name].num_items
            if init.kind == "constant":
                assert torch.equal(value, torch.full_like(value, init.value)), name
            elif init.kind != "own":
                std = init.value if init.kind == "normal" else init.value / 3**0.5
                limit = max(0.02, 5 / (2 * count) ** 0.5)
                assert float(value.std()) == pytest.approx(std, rel=limit), name
                assert abs(float(value.mean())) < 4 * std / count**0.5, name
        dense = {n: t for n, t in spec.tensors.items() if t.role in ("embedding", "head", "matrix")}
        gaussian = [t.init.value for t in dense.values() if t.init.kind == "normal"]
        assert set(gaussian) == {0.05}


@pytest.fixture
def poisoned_memory():
    """Every uninitialised floating tensor holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.empty_like(torch.zeros(3)).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


FILLED = METHODS | {
    f"{linear}-{init}": tiny(linear=linear, **{linear: options(init=init)})
    for linear, options in (("crnet", CRNetOptions), ("lowrank", LowRankOptions))
    for init in ("zero-b", "spectral")
}


@pytest.mark.parametrize("config", FILLED.values(), ids=FILLED)
@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_is_left_uninitialised(config: ModelConfig):
    model = make(config)
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), name
    assert bool(model.logits(random_tokens(1, 5)).isfinite().all())


def test_a_parameter_nobody_lists_is_an_error():
    model = make(TINY)
    model.stray = nn.ParameterList([torch.empty(2)])
    with pytest.raises(AssertionError, match=r"\['stray\.0'\]"):
        fill(model, 0)


class Indexed(Parameterization):
    """Tensors of every dtype: what a sparse or a quantised method has."""

    name = "indexed"

    def fixed_rank(self, layer_idx, options):
        return 0

    def tensors(self, slot, options):
        return {
            "weight": TensorSpec((slot.out_size, slot.in_size), "values", OWN),
            "support": TensorSpec((slot.out_size,), "index", OWN, trained=False, dtype="int32"),
            "scale": TensorSpec((1,), "gain", constant(1 / 3), dtype="float32"),
        }

    def work(self, slot, options, rows, item_bytes):
        return Work(0, 0, 0)

    def initial_value(self, name, slot, options, generator):
        if name == "support":
            return torch.randperm(slot.out_size, generator=generator(name), dtype=torch.int32)
        return torch.randn(slot.out_size, slot.in_size, generator=generator(name)) / 4

    def make(self, slot, options):
        return IndexedMap(self.tensors(slot, options))


class IndexedMap(LinearMap):
    def run(self, x_BTD, carry, known):
        weight = self.weight.index_select(0, self.support) * self.scale.to(self.weight.dtype)
        output = nn.functional.linear(x_BTD, weight)
        return output, output


def test_every_dtype_survives_a_bf16_build():
    """An index of 300 is no bf16 number, and fp32 thirds are none either."""
    spec = model_spec(tiny(linear="full", intermediate_size=301))
    spec = dataclasses.replace(spec, linear=Indexed())
    for dtype in (torch.bfloat16, torch.float32):
        model = build(spec, 0, dtype=dtype)
        assert_listed(spec, model, dtype)
        for name, value in initial_values(spec, 0):
            assert torch.equal(model.get_parameter(name), value.to(model.get_parameter(name).dtype))
    model = build(spec, 0, dtype=torch.bfloat16)
    loss, _ = model(random_tokens(2, 5), random_tokens(2, 5))
    loss.backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == set(model.trained())
    copy = build(spec, 1, dtype=torch.bfloat16)
    copy.load_state_dict(model.state_dict(), strict=True)
    assert_listed(spec, copy, torch.bfloat16)
    assert all(torch.equal(p, copy.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.usefixtures("poisoned_memory")
def test_tied_embeddings_start_as_the_untied_ones():
    model = make(tiny(tie_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied = dict(model.named_parameters())
    assert "lm_head.weight" not in tied
    assert all(bool(parameter.isfinite().all()) for parameter in tied.values())
    assert torch.equal(tied["model.embed_tokens.weight"], state(TINY)["model.embed_tokens.weight"])


def test_tied_model_trains_both_ends_of_one_matrix():
    """The tied matrix' gradient is the sum of the untied embedding's and head's: FP64."""
    tied = make(tiny(tie_embeddings=True)).double()
    untied = randomised(TINY)
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    tied.load_state_dict(untied.state_dict(), strict=True)
    for model in (tied, untied):
        loss, _ = model(random_tokens(2, 7), random_tokens(2, 7, seed=9))
        loss.backward()
    ends = untied.model.embed_tokens.weight.grad, untied.lm_head.weight.grad
    assert ends[0] is not None
    assert ends[1] is not None
    assert error(tied.lm_head.weight.grad, ends[0] + ends[1]) < FP64


def test_a_map_asked_for_twice_is_refused(monkeypatch: pytest.MonkeyPatch):
    """What it hands on would be that of the latter."""
    model = make(TINY)
    block = model.model.blocks()[0]

    def twice(x_BTD: Tensor, project: Projector, context: Any) -> Tensor:
        project("gate", x_BTD)
        return project("gate", x_BTD)

    monkeypatch.setattr(block.mlp, "forward", twice)
    with pytest.raises(RuntimeError, match="asks for the map gate twice in one pass"):
        model.logits(random_tokens(1, 4))


# --- 7. decoding --------------------------------------------------------------------------------


@each_method
def test_cached_logits(config: ModelConfig):
    """The same as without a cache: FP64, as attention sums another number of masked zeros."""
    model = randomised(config)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected = model.logits(tokens)
        for pieces in ((12,), (1,) * 12, (5, 1, 1, 5), (1, 4, 7), (9, 3)):
            cache = model.new_caches(12)
            parts = [model.logits(part, cache) for part in tokens.split(pieces, dim=1)]
            assert error(torch.cat(parts, dim=1), expected) < FP64, pieces
            assert [layer.length for layer in cache] == [12] * 3
            last = model.logits(tokens, model.new_caches(12), last_only=True)
            assert last.shape == (2, 1, 31)
            assert error(last, expected[:, -1:]) < FP64


@pytest.mark.parametrize("room", [12, 13, 40])
def test_capacity_does_not_change_logits(room: int):
    """To the bit: what lies beyond the tokens seen is never read."""
    model = randomised(TINY)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected, actual = (
            torch.cat([model.logits(t, cache) for t in tokens.split((5, 1, 6), dim=1)], dim=1)
            for cache in (model.new_caches(12), model.new_caches(room))
        )
    assert torch.equal(actual, expected)


def test_cache_overflow():
    model = randomised(TINY)
    cache = model.new_caches(6)
    with torch.no_grad():
        model.logits(random_tokens(1, 4), cache)
        with pytest.raises(RuntimeError, match="holds 6 tokens; 4 are in it and 3 more came"):
            model.logits(random_tokens(1, 3), cache)
        model.logits(random_tokens(1, 2), cache)  # what fits is taken
    assert [layer.length for layer in cache] == [6] * 3


@pytest.mark.parametrize("part", ["model.layers.1.mlp", "model.norm", "lm_head"])
@pytest.mark.parametrize("seen", [0, 4])
def test_a_pass_that_fails_adds_nothing_to_the_caches(part: str, seen: int):
    """To the bit: the pass that follows is that of caches which never saw the failure."""
    model, tokens = randomised(TINY), random_tokens(1, 9)

    def fail(*_: object) -> None:
        raise MemoryError

    found = []
    for fails in (False, True):
        caches = model.new_caches(9)
        with torch.no_grad():
            if seen:
                model.logits(tokens[:, :seen], caches)
            if fails:
                hook = model.get_submodule(part).register_forward_pre_hook(fail)
                with hook, pytest.raises(MemoryError):
                    model.logits(tokens[:, seen : seen + 3], caches)
                assert [layer.length for layer in caches] == [seen] * 3
            found.append(model.logits(tokens[:, seen:], caches))
    assert torch.equal(*found)


def test_caches_of_another_batch_are_refused():
    """A batch of one would be spread over the cache of two without a word."""
    model = randomised(TINY)
    caches = model.new_caches(6)
    with torch.no_grad():
        model.logits(random_tokens(2, 3), caches)
        with pytest.raises(RuntimeError, match="take new caches"):
            model.logits(random_tokens(1, 1), caches)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_after_evaluation(mode):
    """What an evaluation computed first and kept (the rotary tables) does not stop a backward."""
    attention._angles.cache_clear()
    model = make(TINY)
    tokens = random_tokens(2, 9)
    with mode():
        expected, _ = model(tokens, tokens)
    loss, _ = model(tokens, tokens)
    loss.backward()
    attention._angles.cache_clear()
    # 1e-6: the loss has two backends, one for training and one for evaluation, both fp32.
    assert error(loss, expected.clone()) < 1e-6


# --- 8. precision and rates ---------------------------------------------------------------------


@each_method
def test_bf16_mixed(config: ModelConfig):
    """Autocast: loss and all gradients fp32 and finite, near the fp32 ones.

    Loss 1%, the norm of the whole gradient's error 3%: bf16's 2^-9 through some thirty products
    in a row. One beta's gradient is a sum that may cancel, and no tolerance of its own would hold.
    """
    model = make(dataclasses.replace(config, init_std=0.1))
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=9)
    expected, _ = model(tokens, targets)
    expected.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, count = model(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert count.item() == 18
    assert error(loss, expected) < 0.01
    for name, (_, parameter) in model.trained().items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all()), name
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    expected_flat = torch.cat([grad.flatten() for grad in grads.values() if grad is not None])
    assert flat.shape == expected_flat.shape
    assert float((flat - expected_flat).norm() / expected_flat.norm()) < most_off(config)


def most_off(config: ModelConfig) -> float:
    """Of ``test_bf16_mixed``: the whole gradient's error over its norm."""
    # Xavier's factors do not hang on init_std: this small, their product is twice a dense map's.
    if config.linear == "loro":
        return 0.06
    # W0 and the update are rounded apart and nearly cancel: their norms are 1.5 to 2 and 1.1 to 1.7
    # times their sum's. One of these tokens goes to another expert for it; over twenty batches
    # errors have a median of 0.030, those of full rank 0.018.
    if (config.linear, config.architecture) == ("switchlora", "qwen3-moe"):
        return 0.05
    # Likewise one token; over twenty batches the median is that of full rank, 0.018.
    if (config.linear, config.architecture) == ("self-guided", "qwen3-moe"):
        return 0.05
    # Its rounding reaches the router: over twenty batches errors have a median of 0.037, 0.014 in
    # llama, where no token can go to another expert.
    if (config.linear, config.architecture) == ("dlr", "qwen3-moe"):
        return 0.05
    return 0.03


@each_method
def test_bf16(config: ModelConfig):
    """Everything bf16: gradients finite and bf16, the loss fp32 and within 2% of the fp32 one."""
    model = make(dataclasses.replace(config, init_std=0.1))
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=9)
    expected, _ = model(tokens, targets)
    loss, _ = model.to(torch.bfloat16)(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert error(loss, expected) < 0.02
    for name, (_, parameter) in model.trained().items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.bfloat16
        assert bool(parameter.grad.isfinite().all()), name


def test_learning_rates_and_decay():
    """Factors at a quarter of the rate, or as the options say; norms and betas do not decay."""
    default = {kind: (0.25, True) for kind in "AB"} | {"beta": (1.0, False), "weight": (1.0, True)}
    given = {kind: (0.5, True) for kind in "AB"} | {"beta": (2.0, False), "weight": (1.0, True)}
    options = CRNetOptions(first_rank=3, lr_factor=0.5, beta_lr_factor=2.0)
    for config, expected in ((TINY, default), (tiny(crnet=options), given)):
        for name, (tensor, _) in make(config).trained().items():
            wanted = (1.0, False) if "norm" in name else expected[name.rpartition(".")[2]]
            assert (tensor.lr_factor, tensor.decays) == wanted, name


def test_rate_of_the_embedding():
    """The factor reaches the embedding and the head, tied or not, and nothing else."""
    for tied, outer in ((False, {"model.embed_tokens", "lm_head"}), (True, {"model.embed_tokens"})):
        config = dataclasses.replace(TINY, embedding_lr_factor=4.0, tie_embeddings=tied)
        plain = dataclasses.replace(config, embedding_lr_factor=1.0)
        before = {name: spec for name, (spec, _) in make(plain).trained().items()}
        after = {name: spec for name, (spec, _) in make(config).trained().items()}
        differ = {name for name in before if after[name] != before[name]}
        assert differ == {f"{name}.weight" for name in outer}
        for name in differ:
            assert after[name] == dataclasses.replace(before[name], lr_factor=4.0)
