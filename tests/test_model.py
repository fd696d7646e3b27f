"""The language model: against transformers' LLaMA, against eq. 6 written out, and its own promises.

Errors are relative to the largest item of the reference; each tolerance is named where it is used.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from crnet import linears
from crnet.config import presets
from crnet.config.sections import ModelConfig
from crnet.linears import POSITIONS
from crnet.linears.crnet import CRNetOptions
from crnet.linears.lowrank import LowRankOptions
from crnet.model import attention
from crnet.model.backbone import LanguageModel, build
from shapes import TINY

FP64 = 1e-12
"""Sums of at most 100 items in another order, through three blocks and back."""


def tiny(**changes: object) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


SHAPES = {
    "full-mha": tiny(linear="full", num_kv_heads=None),
    "full-gqa": tiny(linear="full"),
    "full-mqa": tiny(linear="full", num_kv_heads=1),
    "lowrank": tiny(linear="lowrank"),
    "crnet-mha": tiny(num_kv_heads=None),
    "crnet-gqa": TINY,
    "crnet-by-position": tiny(rank="4,5/k=2/down=0.5h"),
    "crnet-first-lowrank": tiny(crnet=CRNetOptions(first_rank=3)),
    "crnet-first-lowrank-mha": tiny(num_kv_heads=None, crnet=CRNetOptions(first_rank=3)),
}
each_shape = pytest.mark.parametrize(
    "config", [pytest.param(c, id=name) for name, c in SHAPES.items()]
)


def randomised(config: ModelConfig, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model far from its start: norm gains are not 1, betas of both signs, weights not small."""
    model = build(config, seed=0).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif name.endswith(".beta"):
                noise = torch.sign(noise) * (0.2 + noise.abs())
            else:
                noise = noise * 0.5
            parameter.copy_(noise)
    return model


def random_tokens(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor | None, expected: Tensor | None) -> float:
    assert actual is not None
    assert expected is not None
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


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
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )
    return theirs.train()


def norm_without_rounding(self: nn.Module, x: Tensor) -> Tensor:
    """``LlamaRMSNorm.forward`` without its casts to fp32 and back."""
    variance = x.pow(2).mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    ("rounds_norms", "tolerance", "grad_tolerance"), [(True, 1e-6, 4e-6), (False, 1e-8, 1e-8)]
)
def test_equals_transformers(
    transformers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int | None,
    tied: bool,
    theta: float,
    rounds_norms: bool,
    tolerance: float,
    grad_tolerance: float,
):
    """Logits and all gradients, fp64, several lengths.

    As it stands, transformers brings every norm's output to fp32 whatever the dtype: seven norms
    times 2^-24 = 4e-7 forward, and a few times that for gradients small beside those they stem
    from. Without that cast 1e-8: the rotary angles are fp32 on both sides, by two formulas that may
    differ in the last place.
    Over one token attention is the identity: the queries' and keys' gradients are zero, to 1e-14.
    """
    if not rounds_norms:
        norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
        monkeypatch.setattr(norm, "forward", norm_without_rounding)
    config = tiny(linear="full", num_kv_heads=kv_heads, tie_embeddings=tied, rope_theta=theta)
    ours = LanguageModel(config).double()
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
    assert {n: p.shape for n, p in build(config, seed=0).state_dict().items()} == theirs


# --- 2. equation 6 ------------------------------------------------------------------------------


def by_equation(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits of one row of tokens, from the paper's equations, one position and head at a time."""
    config, p = model.config, dict(model.named_parameters())
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
    for idx in range(config.num_layers):
        prefix = f"model.layers.{idx}."
        y: dict[str, Tensor] = {}

        def apply(position: str, x: Tensor, prefix=prefix, y=y, below=below) -> Tensor:
            part = "self_attn" if position in "qkvo" else "mlp"
            name = f"{prefix}{part}.{position}_proj."
            if name + "weight" in p:
                y[position] = x @ p[name + "weight"].T
            else:
                y[position] = x @ p[name + "A"] @ p[name + "B"]
            if name + "beta" in p:
                beta = p[name + "beta"]
                gain = torch.sign(beta) * (beta.abs() + 1e-6)
                y[position] = gain * below[position] + y[position]
            return y[position]

        normed = norm(x, p[prefix + "input_layernorm.weight"])
        q, k, v = (apply(position, normed) for position in "qkv")
        x = x + apply("o", attention(q, k, v))
        normed = norm(x, p[prefix + "post_attention_layernorm.weight"])
        gate, up = apply("gate", normed), apply("up", normed)
        x = x + apply("down", gate / (1 + torch.exp(-gate)) * up)
        below = y
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
    assert len(betas) == (14 if config.linear == "crnet" else 0)


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


@each_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_causality(config: ModelConfig, dtype: torch.dtype):
    """Another token t leaves logits before t bit-identical and changes those at t and after."""
    model = randomised(config, dtype)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        logits = model.logits(tokens)
        for t in (0, 1, 5, 8):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % 31
            others = model.logits(changed)
            assert torch.equal(others[:, :t], logits[:, :t])
            assert bool((others[:, t:] != logits[:, t:]).any(dim=-1).all())


# --- 4. parameter counts ------------------------------------------------------------------------


def counted(preset: str, linear: str) -> ModelConfig:
    config = presets.get(preset)
    model = dataclasses.replace(config.model, linear=linear, vocab_size=config.data.vocab_size)
    published = linears.get(linear).published_ranks.get("aligned-parameters", {})
    if (model.hidden_size, model.num_layers) not in published:
        model = dataclasses.replace(model, rank="0.25h")
    return model


@pytest.mark.parametrize("linear", linears.names())
@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_parameters_of_every_preset(preset: str, linear: str):
    """Closed form == the items of a model laid out without memory, part by part."""
    config = counted(preset, linear)
    with torch.device("meta"):
        model = LanguageModel(config)
    expected = dict.fromkeys(("embedding", "head", "norms", *POSITIONS), 0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            part = "norms"
        elif "_proj." in name:
            part = name.split(".")[-2].removesuffix("_proj")
        else:
            part = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}[name]
        expected[part] += parameter.numel()
    assert linears.num_parameters(config) == expected


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
    """The GaLore family's models, baselines.md, section 1."""
    assert sum(linears.num_parameters(counted(preset, "full")).values()) == expected


@pytest.mark.parametrize("linear", linears.names())
def test_tied_head_is_counted_once(linear: str):
    config = tiny(linear=linear, tie_embeddings=True)
    with torch.device("meta"):
        model = LanguageModel(config)
    counts = linears.num_parameters(config)
    assert counts["head"] == 0
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


# --- 5. the loss --------------------------------------------------------------------------------


@each_shape
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


@each_shape
def test_sums_add_up_over_micro_batches(config: ModelConfig):
    """Unevenly padded micro-batches give the whole batch's loss, count and gradients: FP64."""
    model = randomised(config)
    tokens, targets = random_tokens(4, 7), random_tokens(4, 7, seed=9)
    targets[0, 2:] = targets[3, :5] = -100
    loss, count = model(tokens, targets)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    parts = [model(t, g) for t, g in zip(tokens.split(1), targets.split(1), strict=True)]
    for part, _ in parts:
        part.backward()
    assert sum(int(n) for _, n in parts) == int(count) == 2 + 7 + 7 + 2
    assert error(torch.stack([part for part, _ in parts]).sum(), loss) < FP64
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, expected[name]) < FP64, name


# --- 6. building --------------------------------------------------------------------------------


def state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build(config, seed).named_parameters()}


@each_shape
def test_seed_decides_every_bit(config: ModelConfig):
    first, again, other = state(config), state(config), state(config, seed=1)
    assert first.keys() == again.keys() == other.keys()
    for name in first:
        assert torch.equal(first[name], again[name]), name
        constant = "norm" in name or name.endswith(".beta")
        assert torch.equal(first[name], other[name]) == constant, name


def test_build_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build(TINY, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_embedding_and_head_are_shared_by_every_parameterization():
    """Bit-identical, so that comparisons start from one embedding and one head."""
    expected = state(tiny(linear="full"))
    for config in SHAPES.values():
        actual = state(config)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(actual[name], expected[name])


def test_dense_weights_have_the_asked_deviation():
    """2%: five deviations of a deviation of 64 x 256 items (1 / sqrt(2 x 16384) = 0.55%), less."""
    config = tiny(linear="full", hidden_size=64, intermediate_size=256, vocab_size=256)
    for name, value in state(dataclasses.replace(config, init_std=0.05)).items():
        if "norm" in name:
            assert torch.equal(value, torch.ones(64))
        elif value.numel() == 64 * 256:
            assert float(value.std()) == pytest.approx(0.05, rel=0.02), name
        else:
            assert float(value.std()) == pytest.approx(0.05, rel=0.06), name


@pytest.fixture
def poisoned_memory():
    """Every uninitialised floating tensor holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.empty_like(torch.zeros(3)).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@each_shape
@pytest.mark.parametrize("init", ["balanced", "zero-b", "spectral"])
@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_is_left_uninitialised(config: ModelConfig, init: str):
    config = dataclasses.replace(
        config,
        crnet=dataclasses.replace(config.crnet, init=init),
        lowrank=LowRankOptions(init=init),  # type: ignore[arg-type]
    )
    model = build(config, seed=0)
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), name
    assert list(model.buffers()) == []  # none that a build on meta could leave as garbage
    assert bool(model.logits(random_tokens(1, 5)).isfinite().all())


def test_a_parameter_nobody_initialises_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """A module with a parameter and no way to fill it stops the build."""
    original = LanguageModel.__init__

    def with_stray(self, config):
        original(self, config)
        self.stray = nn.ParameterList([torch.empty(2)])

    monkeypatch.setattr(LanguageModel, "__init__", with_stray)
    with pytest.raises((AssertionError, AttributeError)):
        build(TINY, seed=0)


@pytest.mark.usefixtures("poisoned_memory")
def test_tied_embeddings_start_as_the_untied_ones():
    model = build(tiny(tie_embeddings=True), seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied = dict(model.named_parameters())
    assert "lm_head.weight" not in tied
    assert all(bool(parameter.isfinite().all()) for parameter in tied.values())
    assert torch.equal(tied["model.embed_tokens.weight"], state(TINY)["model.embed_tokens.weight"])


def test_tied_model_trains_both_ends_of_one_matrix():
    """The tied matrix' gradient is the sum of the untied embedding's and head's: FP64."""
    tied = LanguageModel(tiny(tie_embeddings=True)).double()
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


# --- 7. decoding --------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize(
    "pieces",
    [(12,), (1,) * 12, (5, 1, 1, 5), (1, 4, 7), (9, 3)],
    ids=lambda p: "+".join(map(str, p)),
)
def test_cached_logits(config: ModelConfig, pieces: tuple[int, ...]):
    """The same as without a cache: FP64, as attention sums another number of masked zeros."""
    model = randomised(config)
    tokens = random_tokens(2, 12)
    cache = model.new_cache(12)
    with torch.no_grad():
        expected = model.logits(tokens)
        parts = [model.logits(part, cache) for part in tokens.split(pieces, dim=1)]
    assert error(torch.cat(parts, dim=1), expected) < FP64
    assert [layer.length for layer in cache] == [12] * 3


@pytest.mark.parametrize("room", [12, 13, 40])
def test_capacity_does_not_change_logits(room: int):
    """To the bit: what lies beyond the tokens seen is never read."""
    model = randomised(TINY)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected, actual = (
            torch.cat([model.logits(t, cache) for t in tokens.split((5, 1, 6), dim=1)], dim=1)
            for cache in (model.new_cache(12), model.new_cache(room))
        )
    assert torch.equal(actual, expected)


def test_cache_overflow():
    model = randomised(TINY)
    cache = model.new_cache(6)
    with torch.no_grad():
        model.logits(random_tokens(1, 4), cache)
        with pytest.raises(RuntimeError, match="holds 6 tokens; 4 are in it and 3 more came"):
            model.logits(random_tokens(1, 3), cache)
        model.logits(random_tokens(1, 2), cache)  # what fits is taken
    assert [layer.length for layer in cache] == [6] * 3


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_after_evaluation(mode):
    """What an evaluation computed first and kept (the rotary tables) does not stop a backward."""
    attention._angles.cache_clear()
    model = build(TINY, seed=0)
    tokens = random_tokens(2, 9)
    with mode():
        expected, _ = model(tokens, tokens)
    loss, _ = model(tokens, tokens)
    loss.backward()
    attention._angles.cache_clear()
    # 1e-6: the loss has two backends, one for training and one for evaluation, both fp32.
    assert error(loss, expected.clone()) < 1e-6


# --- 8. precision, and the optimizer's groups ---------------------------------------------------


@each_shape
def test_bf16_mixed(config: ModelConfig):
    """Autocast: loss and all gradients fp32 and finite, near the fp32 ones.

    Loss 1%, the norm of the whole gradient's error 3%: bf16's 2^-9 through some thirty products
    in a row. One beta's gradient is a sum that may cancel, and no tolerance of its own would hold.
    """
    model = build(dataclasses.replace(config, init_std=0.1), seed=0)
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
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all()), name
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    expected_flat = torch.cat([grad.flatten() for grad in grads.values() if grad is not None])
    assert flat.shape == expected_flat.shape
    assert float((flat - expected_flat).norm() / expected_flat.norm()) < 0.03


@each_shape
def test_bf16(config: ModelConfig):
    """Everything bf16: gradients finite and bf16, the loss fp32 and within 2% of the fp32 one."""
    model = build(dataclasses.replace(config, init_std=0.1), seed=0)
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=9)
    expected, _ = model(tokens, targets)
    loss, _ = model.to(torch.bfloat16)(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert error(loss, expected) < 0.02
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.bfloat16
        assert bool(parameter.grad.isfinite().all()), name


@each_shape
@pytest.mark.parametrize("tied", [False, True])
def test_optimizer_groups(config: ModelConfig, tied: bool):
    """Every parameter once: factors at a quarter of the rate; norms and betas do not decay."""
    model = LanguageModel(dataclasses.replace(config, tie_embeddings=tied))
    expected = {}
    for name, _ in model.named_parameters():
        kind = name.rpartition(".")[2]
        expected[name] = {"A": (0.25, True), "B": (0.25, True), "beta": (1.0, False)}.get(
            kind, (1.0, "norm" not in name)
        )
    groups = model.optimizer_groups()
    actual = [(name, (group.lr_factor, group.decays)) for group in groups for name in group.names]
    assert len(actual) == len(expected)
    assert dict(actual) == expected
    assert len({(group.lr_factor, group.decays) for group in groups}) == len(groups)
    named = dict(model.named_parameters())
    for group in groups:
        assert len(group.names) == len(group.parameters)
        for name, parameter in zip(group.names, group.parameters, strict=True):
            assert parameter is named[name]


def test_learning_rate_options_reach_the_groups():
    options = CRNetOptions(first_rank=3, lr_factor=0.5, beta_lr_factor=2.0)
    model = build(tiny(crnet=options), seed=0)
    factor = {name: g.lr_factor for g in model.optimizer_groups() for name in g.names}
    by_kind = {kind: set() for kind in ("A", "B", "beta", "weight")}
    for name, value in factor.items():
        by_kind[name.rpartition(".")[2]].add(value)
    assert by_kind == {"A": {0.5}, "B": {0.5}, "beta": {2.0}, "weight": {1.0}}
