"""Generation: what is drawn, that the cache changes nothing, and that text comes out whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.data import tokenizer
from crnet.errors import ConfigError
from crnet.inference.generate import complete, draw, filter_logits, generate
from crnet.inference.sampling import Sampling, check_sampling
from crnet.model.build import build, set_dtype
from crnet.model.language_model import LanguageModel

VOCAB = 61
EOS = 0
SHAPE = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    vocab_size=VOCAB,
    rank="8",
    init_std=0.3,  # wide enough that the likeliest token depends on all that was read
)


def make(linear: str = "full", **changes) -> LanguageModel:
    return build(model_spec(dataclasses.replace(SHAPE, linear=linear, **changes)), seed=1)


class Scripted(nn.Module):
    """Stands for a model: writes the tokens of a script, all but surely, then ``after``."""

    def __init__(
        self, script: list[int], vocab_size: int, after: int = EOS, longest: int | None = None
    ):
        super().__init__()
        self.spec = SimpleNamespace(shape=SimpleNamespace(vocab_size=vocab_size))
        self.weight = nn.Parameter(torch.zeros(1))
        self._script = itertools.chain(script, itertools.repeat(after))
        self._longest = longest

    def max_length(self) -> int | None:
        return self._longest

    def new_caches(self, capacity: int) -> list[None]:
        return [None]

    def logits(self, tokens_BT: Tensor, caches: object, *, last_only: bool) -> Tensor:
        logits = torch.zeros(*tokens_BT.shape, self.spec.shape.vocab_size)
        logits[:, -1, next(self._script)] = 200.0
        return logits


# The choice


def naive_filter(logits: list[float], temperature: float, top_k: int | None, top_p: float | None):
    """Temperature, top-k, softmax, top-p, renormalise: by sorting, in plain Python."""
    scaled = [(value - max(logits)) / temperature for value in logits]
    rank = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))[:top_k]
    total = math.fsum(math.exp(scaled[i]) for i in rank)
    kept, reached = [], 0.0
    for i in rank:
        if top_p is not None and top_p < 1 and reached >= top_p:
            break
        kept.append(i)
        reached += math.exp(scaled[i]) / total
    mass = math.fsum(math.exp(scaled[i]) for i in kept)
    return [math.exp(scaled[i]) / mass if i in kept else 0.0 for i in range(len(logits))]


@settings(deadline=None, max_examples=300)
@given(
    # Quarters: ties are common, and different numbers stay different after the division.
    st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=30),
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.none() | st.integers(1, 40),
    st.none() | st.sampled_from([1e-9, 0.1037, 0.3719, 0.9013, 0.9991, 1.0]),
)
def test_filter_equals_naive(logits, temperature, top_k, top_p):
    # Tolerance: a sum of thirty fp64 exponentials. The set kept is exact: no running sum comes
    # within rounding of these shares (nine of ten equal tokens would of 0.9).
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = filter_logits(torch.tensor(logits), sampling)
    wanted = torch.tensor(naive_filter(logits, temperature, top_k, top_p), dtype=torch.float64)
    assert found.dtype == torch.float64
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=7),
        Sampling(top_k=2999),
        Sampling(top_p=0.5),  # inside what is looked at first
        Sampling(top_p=0.999),  # beyond it
        Sampling(top_k=400, top_p=0.9),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 0.5, 9.0])
def test_a_large_vocabulary_is_filtered_like_a_small_one(spread, sampling):
    """Ties are common: numbers are rounded to quarters, or all alike. Tolerance: sums of 3,000."""
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    logits = (4 * spread * noise).round() / 4
    if not spread and sampling.top_p:
        sampling = dataclasses.replace(sampling, top_p=sampling.top_p - 1e-4)  # not on a border
    found = filter_logits(logits, sampling)
    wanted = torch.tensor(
        naive_filter(logits.tolist(), 1.0, sampling.top_k, sampling.top_p), dtype=torch.float64
    )
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5), Sampling(top_p=0.7)])
def test_the_draw_is_the_race_of_all_ids(sampling):
    """Exact: what cannot be chosen takes its random number too, and no part in the race."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(5))
    probabilities = filter_logits(logits, sampling)
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    for _ in range(50):
        uniform = torch.rand(500, dtype=torch.float64, generator=theirs)
        speed = (probabilities / -uniform.log()).masked_fill(probabilities == 0, -1)
        assert draw(probabilities, ours) == int(speed.argmax())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.5, [0]), (0.500001, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_nucleus_is_the_smallest_set_that_reaches_p(top_p, kept):
    # Running sums 1/2, 3/4, 7/8, 1 up to an ulp of the logarithm, so a border is asked just inside.
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    found = filter_logits(logits, Sampling(top_p=top_p - 1e-12 if top_p < 1 else top_p))
    assert found.nonzero().flatten().tolist() == kept


def test_a_tail_below_rounding_survives_top_p_of_one():
    logits = torch.tensor([0.0, -60.0, -200.0])
    assert (filter_logits(logits, Sampling(top_p=1.0)) > 0).all()
    assert torch.equal(filter_logits(logits, Sampling(top_p=1.0)), logits.double().softmax(0))


def test_top_k_counts_ties_once():
    found = filter_logits(torch.ones(5), Sampling(top_k=2))
    assert found.tolist() == [0.5, 0.5, 0, 0, 0]


def test_extreme_temperatures_stay_finite():
    logits = torch.tensor([3.0, 5.0, 5.0, -7.0])
    assert filter_logits(logits, Sampling(temperature=1e-320)).tolist() == [0, 0.5, 0.5, 0]
    hot = filter_logits(logits, Sampling(temperature=1e300))
    torch.testing.assert_close(hot, torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_are_refused(bad, greedy):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[7] = bad
    with pytest.raises(ConfigError, match="not finite"):
        list(generate(model, [1], Sampling(greedy=greedy), EOS))


def chi_square(counts: Tensor, wanted: Tensor) -> float:
    """Deviations by which the statistic exceeds its mean; the tail is close to a Gaussian's."""
    expected = wanted[wanted > 0] * counts.sum()
    statistic = ((counts[wanted > 0] - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=9), Sampling(temperature=1.5, top_p=0.8)],
    ids=["plain", "top-k", "top-p"],
)
def test_draws_have_the_probabilities(sampling):
    logits = torch.randn(16, generator=torch.Generator().manual_seed(5))
    probabilities = filter_logits(logits, sampling)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(probabilities, generator) for _ in range(20_000)])
    counts = torch.bincount(drawn, minlength=16).double()
    assert (counts[probabilities == 0] == 0).all()
    # Five deviations: about one seed in a hundred thousand would fail; this one is fixed.
    assert chi_square(counts, probabilities) < 5
    # And the bound would notice a temperature that is off by a tenth.
    warmer = dataclasses.replace(sampling, temperature=1.1 * sampling.temperature, top_p=None)
    if sampling.top_p is None:
        assert chi_square(counts, filter_logits(logits, warmer)) > 5


def test_a_draw_from_one_certain_token():
    generator = torch.Generator().manual_seed(0)
    certain = torch.zeros(50, dtype=torch.float64)
    certain[31] = 1
    assert {draw(certain, generator) for _ in range(200)} == {31}


def test_a_random_number_of_zero_draws_no_impossible_token(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, *, dtype, generator: torch.zeros(n, dtype=dtype))
    assert draw(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), torch.Generator()) == 2


def test_one_token_after_many_seeds_has_the_probabilities():
    # The whole path, model included: the first token over seeds, which are independent.
    model = make().double()
    logits = model.logits(torch.tensor([[1, 2, 3]]))[0, -1]
    sampling = Sampling(max_tokens=1, top_k=8, stop_at_end=False)
    drawn = [
        next(generate(model, [1, 2, 3], dataclasses.replace(sampling, seed=seed), EOS))
        for seed in range(500)
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    assert chi_square(counts, filter_logits(logits, sampling)) < 5


# The loop

PROMPT = [5, 17, 3, 42, 8]


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("linear", ["crnet", "value-resformer"])  # all: the contract
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(greedy=True),
        Sampling(seed=3),
        Sampling(seed=4, temperature=0.8, top_k=20, top_p=0.9),
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_cache_changes_no_token(linear, kv_heads, sampling):
    # Exact: in fp64 the logits differ by 1e-14, the choices by far more.
    model = make(linear, num_kv_heads=kv_heads).double()
    sampling = dataclasses.replace(sampling, max_tokens=40, stop_at_end=False)
    cached = list(generate(model, PROMPT, sampling, EOS))
    fresh = dataclasses.replace(sampling, use_cache=False)
    assert cached == list(generate(model, PROMPT, fresh, EOS))
    assert len(cached) == 40
    assert linear == "cola" or len(set(cached)) > 3, "a text of one token would prove nothing"


def test_greedy_equals_a_plain_loop():
    model = make("crnet")
    ids = list(PROMPT)
    for _ in range(20):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    sampling = Sampling(greedy=True, max_tokens=20, stop_at_end=False, use_cache=False)
    assert list(generate(model, PROMPT, sampling, EOS)) == ids[len(PROMPT) :]


@pytest.mark.parametrize("only_likeliest", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}])
def test_only_the_likeliest_is_greedy(only_likeliest):
    model = make("crnet")
    sampling = Sampling(**only_likeliest, max_tokens=30, stop_at_end=False)
    greedy = Sampling(greedy=True, max_tokens=30, stop_at_end=False)
    assert list(generate(model, PROMPT, sampling, EOS)) == list(
        generate(model, PROMPT, greedy, EOS)
    )


def test_seed_decides_the_text():
    model = make()
    texts = [list(generate(model, PROMPT, Sampling(seed=seed), EOS)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert list(generate(model, PROMPT, Sampling(seed=0), EOS)) == texts[0]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is nobody's business"


def test_seeds_that_agree_in_their_lowest_bits_write_other_texts():
    """torch's CPU generator takes the lowest 32 bits of a number, and no more than 64."""
    model = make()
    seeds = (0, 2**32, 2**64, 2**96)
    texts = {tuple(generate(model, PROMPT, Sampling(seed=seed), EOS)) for seed in seeds}
    assert len(texts) == len(seeds)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens(max_tokens, use_cache):
    sampling = Sampling(max_tokens=max_tokens, stop_at_end=False, use_cache=use_cache)
    assert len(list(generate(make(), PROMPT, sampling, EOS))) == max_tokens


def test_end_of_text_stops_or_not():
    def written(**options) -> list[int]:
        script = Scripted([4, 9, EOS, 5], VOCAB)
        return list(generate(script, [1], Sampling(max_tokens=5, **options), EOS))

    assert written() == [4, 9]
    assert written(stop_at_end=False) == [4, 9, EOS, 5, EOS]


def test_empty_prompt_starts_after_end_of_text():
    model = make()
    sampling = Sampling(max_tokens=10)
    assert list(generate(model, [], sampling, 7)) == list(generate(model, [7], sampling, 7))


def test_the_prompt_is_left_alone():
    prompt = list(PROMPT)
    list(generate(make(), prompt, Sampling(max_tokens=3, use_cache=False), EOS))
    assert prompt == PROMPT


def test_ids_the_tokenizer_lacks_are_never_chosen():
    sampling = Sampling(max_tokens=200, temperature=50.0, stop_at_end=False)
    assert max(generate(make(), PROMPT, sampling, EOS)) >= 50
    assert max(generate(make(), PROMPT, sampling, EOS, num_ids=50)) < 50


def test_modes_are_restored_while_the_text_is_written():
    model = make()
    model.train()
    model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []
    model.model.layers[0].register_forward_hook(lambda m, *_: seen.append(m.training))
    tokens = generate(model, PROMPT, Sampling(stop_at_end=False), EOS)
    next(tokens)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert seen == [False]


def test_the_modules_are_walked_once_a_text(monkeypatch: pytest.MonkeyPatch):
    model, walks = make(), []
    modules = nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: walks.append(1) or modules(self))
    list(generate(model, PROMPT, Sampling(max_tokens=9, stop_at_end=False), EOS))
    assert len(walks) == 1


def test_the_likeliest_of_equal_logits_is_the_lowest_id():
    model = Scripted([], VOCAB)
    model.logits = lambda tokens, caches, *, last_only: torch.zeros(1, 1, VOCAB)
    assert list(generate(model, [1], Sampling(greedy=True, max_tokens=2), VOCAB - 1)) == [0, 0]


def test_training_goes_on_after_generating():
    # Fails under inference_mode: the rotary tables made here are used again by the backward.
    model = make(rope_theta=4321.0)
    list(generate(model, PROMPT, Sampling(max_tokens=3), EOS))
    tokens = torch.tensor([PROMPT])
    loss_sum, _ = model(tokens, tokens)
    loss_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_low_precision_models_generate():
    model = make("crnet")
    set_dtype(model, torch.bfloat16)
    assert len(list(generate(model, PROMPT, Sampling(max_tokens=5, stop_at_end=False), EOS))) == 5


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "--max-tokens is 0; it must be at least 1"),
        ({"max_tokens": 2**31}, "--max-tokens is 2147483648; it must be below 2**31"),
        ({"temperature": 0.0}, "--temperature is 0; use --greedy"),
        ({"temperature": -1.0}, "--temperature is -1.0; it must be above zero"),
        ({"temperature": math.nan}, "--temperature is nan; it must be above zero"),
        ({"temperature": math.inf}, "--temperature is inf; it must be above zero, finite"),
        ({"top_k": 0}, "--top-k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "--top-p is 0.0; it is a share"),
        ({"top_p": 1.5}, "--top-p is 1.5; it is a share"),
        ({"top_p": math.nan}, "--top-p is nan; it is a share"),
        ({"seed": -1}, "--seed is -1; it must be zero or more"),
        ({"greedy": True, "top_k": 3, "top_p": 0.5}, "so --top-k, --top-p would have no effect"),
        ({"greedy": True, "temperature": 0.5}, "so --temperature would have no effect"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError) as caught:
        check_sampling(Sampling(**options))
    assert len(caught.value.problems) == 1
    assert message in str(caught.value)
    with pytest.raises(ConfigError):
        generate(make(), PROMPT, Sampling(**options), EOS)


def test_all_problems_at_once_and_at_the_call():
    bad = Sampling(max_tokens=-1, temperature=0.0, top_k=0, top_p=2.0, seed=-5)
    with pytest.raises(ConfigError) as caught:
        generate(make(), [3, VOCAB, -1], bad, VOCAB)
    text = str(caught.value)
    assert len(caught.value.problems) == 7
    assert f"the prompt has id {VOCAB}, but ids lie in [0, {VOCAB})" in text
    assert f"the end-of-text id is {VOCAB}" in text


@pytest.mark.parametrize(
    ("prompt", "mend"),
    [([1] * 6, "take --max-tokens 2 or less"), ([1] * 9, "shorten the prompt to 7 tokens or less")],
)
def test_a_text_longer_than_the_model_reads_is_refused_at_the_call(prompt, mend):
    model = Scripted([4], VOCAB, after=4, longest=8)
    with pytest.raises(ConfigError, match=mend) as caught:
        generate(model, prompt, Sampling(max_tokens=3), EOS)
    assert f"a prompt of {len(prompt)} tokens and --max-tokens 3" in str(caught.value)
    assert len(list(generate(model, [1] * 5, Sampling(max_tokens=3), EOS))) == 3
    with pytest.raises(ConfigError):  # an empty prompt is one token
        generate(model, [], Sampling(max_tokens=8), EOS)
    assert len(list(generate(model, [], Sampling(max_tokens=7), EOS))) == 7


def test_good_options_pass():
    check_sampling(Sampling())
    check_sampling(Sampling(greedy=True))
    check_sampling(Sampling(max_tokens=1, temperature=1e-9, top_k=1, top_p=1.0, seed=2**70))


# Text


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    """Byte-level BPE with few merges: most characters beyond ASCII are several tokens."""
    return tokenizer.train(["hello world, the café and the naïve café, 東京 東京"] * 3, 270)


TEXT = "naïve 😀👩‍👩‍👧 日本語 Ω\n the end"


def test_streamed_text_is_whole(bpe):
    script = bpe.encode(TEXT)
    assert len(script) > len(TEXT)
    model = Scripted(script, bpe.vocab_size, after=bpe.eos_id)
    pieces = list(complete(model, bpe, "hello", Sampling(max_tokens=500, greedy=True)))
    assert "".join(pieces) == TEXT
    assert all(pieces)
    assert not any("�" in piece for piece in pieces)
    assert len(pieces) > len(TEXT) / 3, "pieces come as they are written, not at the end"


def test_a_character_is_given_as_soon_as_it_is_complete(bpe):
    script = bpe.encode("a😀b")
    assert len(script) == 6
    model = Scripted(script, bpe.vocab_size, after=bpe.eos_id)
    assert list(complete(model, bpe, "x", Sampling(greedy=True))) == ["a", "😀", "b"]


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=8), st.data())
def test_streamed_ids_equal_decoding_all(bpe, prompt, data):
    # Any ids, also bytes that are no text, and a text that stops inside a character.
    script = data.draw(st.lists(st.integers(0, bpe.vocab_size - 1), min_size=1, max_size=30))
    model = Scripted(script, bpe.vocab_size)
    options = Sampling(max_tokens=len(script), greedy=True, stop_at_end=False)
    pieces = list(complete(model, bpe, prompt, options))
    prompt_ids = bpe.encode(prompt) or [bpe.eos_id]
    before = bpe.decode(prompt_ids)
    assert before + "".join(pieces) == bpe.decode(prompt_ids + script)
    assert all(pieces)


def test_a_text_cut_inside_a_character_ends_with_the_sign_for_it(bpe):
    script = bpe.encode("ab😀")
    model = Scripted(script, bpe.vocab_size)
    pieces = list(complete(model, bpe, "x", Sampling(greedy=True, max_tokens=len(script) - 1)))
    assert "".join(pieces) == "ab�"


def test_end_of_text_is_not_written_unless_asked(bpe):
    def text(**options) -> str:
        model = Scripted(bpe.encode("hello"), bpe.vocab_size, after=bpe.eos_id)
        wanted = Sampling(max_tokens=len(bpe.encode("hello")) + 1, greedy=True, **options)
        return "".join(complete(model, bpe, "", wanted))

    assert text() == "hello"
    assert text(stop_at_end=False) == "hello" + tokenizer.END_OF_TEXT


def test_a_model_with_more_rows_than_the_tokenizer_has_entries(bpe):
    model = make(vocab_size=bpe.vocab_size + 100)
    options = Sampling(max_tokens=60, temperature=50.0, stop_at_end=False)
    assert "".join(complete(model, bpe, "the", options))


def test_a_prompt_from_a_larger_tokenizer_is_refused_at_the_call(bpe):
    with pytest.raises(ConfigError, match="the prompt has id"):
        complete(make(), bpe, "東京", Sampling())


def test_a_prompt_that_is_no_text_is_refused(bpe):
    with pytest.raises(ConfigError, match="not valid text at character 4"):
        complete(make(), bpe, "caf\udce9", Sampling())
