"""Attention in LLaMA: norms of queries and keys, a window, heads of a width of their own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crnet import architectures
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig, RunConfig
from crnet.config.serialize import override
from crnet.cost.step import attended, step_flops
from crnet.cost.workload import workload
from crnet.errors import ConfigError
from crnet.hub.export import merged
from crnet.hub.names import own_names
from crnet.layers.attention import Attention, Context, rope
from crnet.layers.projector import Projector
from shapes import error, make, random_tokens, randomised, tiny

OPTIONS: Any = architectures.get("llama").Options


def with_options(**options: Any) -> dict[str, Any]:
    """Changes of a model: heads are wider together than the stream."""
    return {"head_size": 6, "llama": OPTIONS(**options)}


# --- against the formula --------------------------------------------------------------------------


class Plain(nn.Module):
    """Dense maps, called as a block's."""

    def __init__(self, in_size: int, out_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_size, in_size, dtype=torch.float64) * 0.4)

    def forward(self, x: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        y = x @ self.weight.T
        return y, y

    def bias_to_add(self) -> None:
        return None


def naive(attention: Any, maps: dict[str, Any], x: Tensor, window: int | None) -> Tensor:
    """Token by token and head by head: softmax over the tokens that one may look at."""
    size, theta = attention.head_size, 100.0
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size

    def heads(name: str) -> Tensor:
        y = (x @ maps[name].weight.T).unflatten(-1, (-1, size))
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        if name == "v":
            return y
        angles = torch.arange(x.shape[1])[:, None, None].double() * theta**-exponents
        first, second = y.chunk(2, -1)
        turned = (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        )
        return torch.cat(turned, -1)

    q, k, v = heads("q"), heads("k"), heads("v")
    k, v = (each.repeat_interleave(q.shape[2] // k.shape[2], 2) for each in (k, v))
    rows = []
    for i in range(x.shape[1]):
        low = 0 if window is None else max(0, i - window + 1)
        scores = torch.einsum("bnh,btnh->bnt", q[:, i], k[:, low : i + 1]) / size**0.5
        rows.append(torch.einsum("bnt,btnh->bnh", scores.softmax(-1), v[:, low : i + 1]))
    return torch.stack(rows, 1).flatten(-2) @ maps["o"].weight.T


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_attention_is_its_formula(qk_norm: bool, window: int | None):
    """fp64; the output, and the gradient of the input, of every map and of both norms. The angles
    are fp32: 1e-6."""
    torch.manual_seed(3)
    attention = Attention(0, 6, 1e-6 if qk_norm else None, window).double()
    sizes = {"q": (10, 24), "k": (10, 12), "v": (10, 12), "o": (24, 10)}
    maps = {name: Plain(*size) for name, size in sizes.items()}
    for parameter in attention.parameters():
        parameter.data.normal_(1.0, 0.4)
    x = torch.randn(2, 7, 10, dtype=torch.float64, requires_grad=True)
    context = Context(rope(0, 7, 6, 100.0, x.device))
    actual = attention(x, Projector(maps, {}, ()), context)
    expected = naive(attention, maps, x, window)
    assert error(actual, expected) < 1e-6
    wanted = [x, *attention.parameters(), *(each.weight for each in maps.values())]
    probe = torch.randn(actual.shape, dtype=torch.float64)
    found = torch.autograd.grad((actual * probe).sum(), wanted)
    gradients = torch.autograd.grad((expected * probe).sum(), wanted)
    for one, other in zip(found, gradients, strict=True):
        # Of a window of one token no query and no key matters.
        assert float((one - other).abs().max()) < 1e-6 * (1 + float(other.abs().max()))


@pytest.mark.parametrize("parts", [(9,), (1,) * 9, (5, 1, 1, 2), (2, 6, 1)])
def test_a_cache_gives_the_windows_of_the_whole_row(parts: tuple[int, ...]):
    """However the tokens come: a prompt, one by one, several at once behind others."""
    model = randomised(make(tiny(**with_options(qk_norm=True, window=3))))
    tokens = random_tokens(2, 9)
    whole, caches = model.logits(tokens), model.new_caches(9)
    found = [model.logits(part, caches) for part in tokens.split(list(parts), dim=1)]
    assert error(torch.cat(found, 1), whole) < 1e-9
    everything = randomised(make(tiny(**with_options(qk_norm=True)))).logits(tokens)
    assert error(whole[:, :3], everything[:, :3]) < 1e-9
    assert error(whole[:, 3:], everything[:, 3:]) > 1e-3


def test_a_window_as_long_as_the_row_is_none():
    """To the bit: no mask is made."""
    tokens = random_tokens(2, 9)
    models = [randomised(make(tiny(**with_options(window=size)))) for size in (9, 100, None)]
    first, *others = [model.logits(tokens) for model in models]
    assert all(torch.equal(first, other) for other in others)


def test_a_window_reads_so_many_tokens_and_no_more():
    """A block of window 3 sees two tokens back, three blocks six."""
    model = randomised(make(tiny(**with_options(window=3))))
    tokens = random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % 31
    differs = (model.logits(tokens) != model.logits(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(2, 9))


# --- sizes and costs ------------------------------------------------------------------------------


def test_heads_may_be_wider_than_the_stream():
    spec = model_spec(tiny(linear="full", **with_options(qk_norm=True)))
    shapes = {name: each.shape for name, each in spec.tensors.items() if "layers.1." in name}
    prefix = "model.layers.1.self_attn."
    assert shapes[f"{prefix}q_proj.weight"] == (24, 16)
    assert shapes[f"{prefix}k_proj.weight"] == (12, 16)
    assert shapes[f"{prefix}o_proj.weight"] == (16, 24)
    assert shapes[f"{prefix}q_norm.weight"] == shapes[f"{prefix}k_norm.weight"] == (6,)


@pytest.mark.parametrize(
    ("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 9), (5, 1)]
)
def test_pairs_that_are_attended_to(length: int, window: int | None):
    reach = length if window is None else window
    pairs = [(i, j) for i in range(length) for j in range(i + 1) if i - j < reach]
    assert attended(length, window) == len(pairs)


def test_flops_of_attention_say_what_a_window_saves():
    """What torch counts is all pairs; a kernel that skips masked ones needs the window's."""
    model = {"linear": "full", "vocab_size": 31}
    plain = workload(override(RunConfig(), model=model, data={"sequence_length": 64}))
    changed = override(
        RunConfig(), model=model | {"llama": {"window": 16}}, data={"sequence_length": 64}
    )
    found, before = (step_flops(each, each.plan) for each in (workload(changed), plain))
    assert found["attention"] == before["attention"]
    ratio = attended(64, 16) / attended(64, None)
    assert found["attention if causal"] == pytest.approx(ratio * before["attention if causal"])


def test_what_is_refused():
    for changes, words in (
        ({"llama": OPTIONS(window=0)}, "--model.llama.window is 0"),
        ({"head_size": 5}, "--model.head-size 6"),
        ({"head_size": 0}, "--model.head-size is 0"),
        ({"architecture": "gpt2", "num_kv_heads": None, "head_size": 8}, "leave it out"),
        ({"architecture": "gpt2", "num_kv_heads": None, "llama": OPTIONS(qk_norm=True)}, "qk-norm"),
    ):
        with pytest.raises(ConfigError, match=words):
            check(RunConfig(model=tiny(**changes)))
    check(RunConfig(model=tiny(num_heads=6, num_kv_heads=3, head_size=4)))


# --- transformers ---------------------------------------------------------------------------------

THEIRS = {
    "qwen3": {"qk_norm": True},
    "mistral": {"window": 3},
    "qwen3 with a window": {"qk_norm": True, "window": 3},
}


def theirs_of(config: ModelConfig) -> Any:
    """transformers' own model that ``plain_form`` names, eager attention, fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    from crnet.hub.names import standard_names

    spec = model_spec(config)
    form = dict(spec.architecture.plain_form(spec.shape, spec.architecture_options) or {})
    name = form.pop("architectures")[0]
    kind = getattr(transformers, name)
    described = {**form, **standard_names(config, 64)}
    described.pop("model_type")
    found = kind(kind.config_class(**described, attn_implementation="eager")).double().eval()
    assert type(found).__name__ == name
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_logits_and_gradients_are_those_of_transformers(name: str):
    """Weights copied, fp64. transformers rounds norms and softmax to fp32: a few times 1e-7."""
    config = tiny(linear="full", norm_eps=1e-5, **with_options(**THEIRS[name]))
    ours, theirs = randomised(make(config)), theirs_of(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens = random_tokens(2, 9)
    logits, expected = ours.logits(tokens), theirs(tokens, use_cache=False).logits
    assert error(logits, expected) < 3e-6
    probe = torch.randn(logits.shape, dtype=torch.float64)
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients = {each: parameter.grad for each, parameter in theirs.named_parameters()}
    for each, parameter in ours.named_parameters():
        assert error(parameter.grad, gradients[each]) < 3e-5, each
    caches, past = ours.new_caches(9), None
    with torch.no_grad():
        for part in tokens.split([5, 1, 3], dim=1):
            answer = theirs(part, past_key_values=past, use_cache=True)
            past = answer.past_key_values
            assert error(ours.logits(part, caches), answer.logits) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_in_transformers(name: str, tmp_path: Path):
    """``crnet.hf``: logits of the whole row, token by token with its cache, and after a reload; and
    a low-rank model merged into transformers' own."""
    import transformers

    import crnet.hf

    config = tiny(linear="lowrank", **with_options(**THEIRS[name]))
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
    plain = theirs_of(config)
    plain.load_state_dict(merged(own), strict=True)
    assert error(plain(tokens).logits, wanted) < 1e-3
