"""The parameterizations: ranks, initial values, gain, and what equals what.

Equality is exact for integers and for a gain; a tolerance is named where it is used.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet import linears
from crnet.config import presets
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.linears import parse_ranks
from crnet.linears._maps import DenseMap, LowRankMap
from crnet.linears.crnet import CRNetOptions, ResFormerOptions
from crnet.linears.crnet.module import EPS, CRNetMap, gain
from crnet.linears.lowrank import LowRankOptions
from crnet.model.build import initial_values
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of
from crnet.specs import Slot
from shapes import error, make, tiny

POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- ranks --------------------------------------------------------------------------------------

PUBLISHED = {"aligned-parameters": "5x3,6x4", "aligned-memory": "7"}


def ranks(text: str, num_blocks: int = 7) -> dict[str, list[int]]:
    return parse_ranks(
        text,
        num_blocks=num_blocks,
        hidden_size=512,
        published=PUBLISHED,
        positions=POSITIONS,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("96", [96] * 7),
        ("96x7", [96] * 7),
        ("96x3,112x4", [96] * 3 + [112] * 4),
        ("96x3, 112x4", [96] * 3 + [112] * 4),
        ("1,2,3,4,5,6,7", [1, 2, 3, 4, 5, 6, 7]),
        ("1,2x2,3x4", [1, 2, 2, 3, 3, 3, 3]),
        ("0.25h", [128] * 7),
        (".25h", [128] * 7),
        ("0.25hx7", [128] * 7),
        ("0.25hx3,0.5hx4", [128] * 3 + [256] * 4),
        ("0.251h", [129] * 7),  # 128.512, to the nearest
        ("1.0h", [512] * 7),
        ("aligned-parameters", [5] * 3 + [6] * 4),
        ("aligned-memory", [7] * 7),
    ],
)
def test_ranks(text: str, expected: list[int]):
    assert ranks(text) == dict.fromkeys(POSITIONS, expected)


def test_ranks_apart():
    common = [96] * 7
    assert ranks("96x7/v=128x7/down=0.25hx3,8x4") == dict.fromkeys(POSITIONS, common) | {
        "v": [128] * 7,
        "down": [128] * 3 + [8] * 4,
    }
    assert ranks("96/v=128") == dict.fromkeys(POSITIONS, common) | {"v": [128] * 7}


def test_ranks_of_no_block():
    assert ranks("aligned-nothing", num_blocks=0) == {position: [] for position in POSITIONS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' cannot be read; write 96, 96x3,112x4, 0.25h"),
        ("many", "'many' cannot be read"),
        ("-3", "'-3' cannot be read"),
        ("96x", "'96x' cannot be read"),
        ("x3", "'x3' cannot be read"),
        ("96x3,", "'' cannot be read"),
        ("96x3,much", "'much' cannot be read"),
        ("0.25", "'0.25' cannot be read"),
        ("0", "'0' is a rank of 0; take 1 or more"),
        ("0x7", "'0x7' is a rank of 0"),
        ("0.0001h", "'0.0001h' is a rank of 0"),
        ("96x3", "96x3 gives 3 ranks, but 7 blocks are low rank; 96 alone would serve"),
        ("96x3,112x5", "gives 8 ranks, but 7 blocks"),
        ("96,97", "gives 2 ranks, but 7 blocks"),
        ("96x1", "gives 1 ranks, but 7 blocks"),
        ("96x0", "96x0"),
        ("96x0,5x0", "96x0"),
        ("aligned-nothing", "aligned-nothing: no published table gives ranks of this shape"),
        ("96/w=8", "'w' is no position; known: q, k, v, o, gate, up, down"),
        ("96/v", "'' cannot be read"),
        ("96/v=8x2", "8x2 gives 2 ranks, but 7 blocks"),
        ("/v=8", "'' cannot be read"),
        ("96/v=8/v=9", "gives v twice; leave one out"),
    ],
)
def test_unreadable_ranks(text: str, message: str):
    with pytest.raises(ValueError, match=r"--model\.rank") as caught:
        ranks(text)
    assert message in str(caught.value)


# --- slots --------------------------------------------------------------------------------------

WIDTHS = {
    "q": (16, 16),
    "k": (16, 8),
    "v": (16, 8),
    "o": (16, 16),
    "gate": (16, 24),
    "up": (16, 24),
    "down": (24, 16),
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"linear": "full", "rank": "never read"}, [[0] * 7] * 3),
        ({"linear": "lowrank"}, [[4] * 7] * 3),
        ({"linear": "lowrank", "rank": "4,5,6"}, [[4] * 7, [5] * 7, [6] * 7]),
        ({"linear": "crnet"}, [[0] * 7, [4] * 7, [4] * 7]),
        ({"linear": "crnet", "rank": "4,5"}, [[0] * 7, [4] * 7, [5] * 7]),
        (
            {"linear": "crnet", "rank": "4,5/k=2/down=0.5h"},
            [[0] * 7, [4, 2, 4, 4, 4, 4, 8], [5, 2, 5, 5, 5, 5, 8]],
        ),
        ({"linear": "crnet", "crnet": CRNetOptions(first_rank=3)}, [[3] * 7, [4] * 7, [4] * 7]),
        ({"linear": "crnet", "num_layers": 1}, [[0] * 7]),
    ],
)
def test_slots(changes: dict, expected: list[list[int]]):
    spec = model_spec(tiny(**changes, init_std=0.3))
    heads = dict.fromkeys("qkv", 4)
    assert spec.slots == tuple(
        tuple(
            Slot(
                *(position, layer_idx, spec.num_layers, *WIDTHS[position], rank, 0.3),
                heads.get(position, 0),
            )
            for position, rank in zip(POSITIONS, block, strict=True)
        )
        for layer_idx, block in enumerate(expected)
    )


@pytest.mark.parametrize(
    ("linear", "rank"), [("crnet", "4,5,6"), ("lowrank", "4,5"), ("crnet", "aligned-memory")]
)
def test_slots_of_another_depth(linear: str, rank: str):
    with pytest.raises(ValueError, match=r"--model\.rank"):
        model_spec(tiny(linear=linear, rank=rank))


def test_unknown_parameterization():
    with pytest.raises(ValueError, match=r"has no 'crnett'; known: .*crnet"):
        linears.get("crnett")


def test_modules_of_slots():
    """CR-Net: the first block's modules are dense, or plain factors where it has a rank."""

    def kinds(**changes: Any) -> list[type]:
        return [type(block.maps["v"]) for block in make(tiny(**changes)).model.blocks()]

    assert kinds(linear="full") == [DenseMap] * 3
    assert kinds(linear="lowrank") == [LowRankMap] * 3
    assert kinds(linear="crnet") == [DenseMap, CRNetMap, CRNetMap]
    assert kinds(linear="resformer") == [DenseMap, CRNetMap, CRNetMap]
    options = CRNetOptions(first_rank=3)
    assert kinds(linear="crnet", crnet=options) == [CRNetMap] * 3


@pytest.mark.parametrize(
    ("linear", "reads", "hands"),
    [
        ("full", (), ()),
        ("lowrank", (), ()),
        ("crnet", ("below", "below"), (0, 1)),
        ("resformer", ("first", "first"), (0,)),
    ],
)
def test_who_reads_whom(linear: str, reads: tuple[str, ...], hands: tuple[int, ...]):
    """Every position of a block alike; what nobody reads is not handed on."""
    spec = model_spec(tiny(linear=linear))
    for source, block in zip(("", *reads), spec.reads, strict=False):
        assert {name: read.source for name, read in block.items()} == (
            dict.fromkeys(POSITIONS, source) if source else {}
        )
    assert spec.hands == tuple(POSITIONS if idx in hands else () for idx in range(3))


@pytest.mark.parametrize(
    ("linear", "options", "fragments"),
    [
        ("crnet", CRNetOptions(), []),
        ("crnet", CRNetOptions(first_rank=0), ["--model.crnet.first-rank is 0"]),
        ("crnet", CRNetOptions(lr_factor=0.0), ["--model.crnet.lr-factor is 0.0"]),
        (
            "crnet",
            CRNetOptions(beta_lr_factor=-1.0, first_rank=-2),
            ["--model.crnet.beta-lr-factor is -1.0", "--model.crnet.first-rank is -2"],
        ),
        ("crnet", CRNetOptions(learnable_beta=False, beta_init=0.0), ["is plain low rank"]),
        ("crnet", CRNetOptions(learnable_beta=True, beta_init=0.0), []),
        ("lowrank", LowRankOptions(), []),
        ("lowrank", LowRankOptions(lr_factor=0.0), ["--model.lowrank.lr-factor is 0.0"]),
        ("resformer", ResFormerOptions(lr_factor=-1.0), ["--model.resformer.lr-factor is -1.0"]),
        ("full", None, []),
    ],
)
def test_problems(linear: str, options: object, fragments: list[str]):
    problems = linears.get(linear).problems(options, ())
    assert len(problems) == len(fragments)
    for problem, fragment in zip(problems, fragments, strict=True):
        assert fragment in problem


# --- initial values -----------------------------------------------------------------------------


def pairs(init: str, d: int, r: int, f: int, std: float = 0.02) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of q (D, D), up (D, F) and down (F, D) of a model with one low-rank block."""
    shape = {"hidden_size": d, "intermediate_size": f, "num_layers": 1, "vocab_size": 8}
    shape["num_kv_heads"] = None
    options = LowRankOptions(init=init)  # type: ignore[arg-type]
    spec = model_spec(tiny(linear="lowrank", rank=str(r), init_std=std, lowrank=options, **shape))
    values = dict(initial_values(spec, seed=0))
    found = {}
    for slot in spec.slots[0]:
        if slot.position in ("q", "up", "down"):
            name = spec.map_name(slot)
            found[name] = values[f"{name}.A"], values[f"{name}.B"]
    return found


@pytest.mark.parametrize(("r", "std"), [(96, 0.02), (128, 0.1)])
def test_balanced_factors(r: int, std: float):
    """Both of standard deviation (std / sqrt R)^(1/2), so that their product has ``std``.

    2%: the relative deviation of the product's is sqrt((2/D + 2/F) / R) / 2, below 0.5% here.
    """
    for a, b in pairs("balanced", 512, r, 1376, std).values():
        each = (std / r**0.5) ** 0.5
        assert float((a @ b).std()) == pytest.approx(std, rel=0.02)
        assert float(a.std()) == pytest.approx(each, rel=0.02)
        assert float(b.std()) == pytest.approx(each, rel=0.02)
        assert abs(float(a.mean())) < 4 * each / a.numel() ** 0.5  # four deviations of a mean


def test_zero_b_factors():
    """B exactly zero, A Gaussian of D^-1/2 (2%: three deviations of a deviation of D R items)."""
    for a, b in pairs("zero-b", 256, 64, 1376).values():
        assert torch.equal(b, torch.zeros_like(b))
        assert float(a.std()) == pytest.approx(a.shape[0] ** -0.5, rel=0.02)
        assert bool((a != 0).all())


@pytest.mark.parametrize(("d", "r", "f"), [(48, 8, 64), (32, 32, 32)])
def test_spectral_factors(d: int, r: int, f: int):
    """The truncated SVD of the dense matrix that the same name gives.

    1e-5 of the largest item: fp32 against an fp64 SVD of the same numbers.
    """
    for name, (a, b) in pairs("spectral", d, r, f).items():
        dense = torch.empty(a.shape[0], b.shape[1])
        dense = dense.normal_(0, 0.02, generator=generator_of(0, name, "dense")).double()
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        expected = left[:, :r] * values[:r] @ right[:r]
        product = a.double() @ b.double()
        assert float((product - expected).abs().max() / expected.abs().max()) < 1e-5
        # The best rank-R approximation errs by the singular values left out (Eckart and Young).
        missing = float(torch.linalg.norm(dense - product))
        assert missing == pytest.approx(float(torch.linalg.norm(values[r:])), rel=1e-5, abs=1e-5)
        # Balanced: A^T A = B B^T = the singular values kept.
        for gram in (a.T.double() @ a.double(), b.double() @ b.T.double()):
            assert float((gram - values[:r].diag()).abs().max() / values[0]) < 1e-5


@pytest.mark.parametrize("linear", ["crnet", "lowrank", "resformer"])
@pytest.mark.parametrize("init", ["balanced", "zero-b", "spectral"])
def test_init_option_reaches_every_factor(linear: str, init: str):
    """Each pair of the model is of that kind: told apart by B and by A's Gram."""
    options = type(linears.get(linear).Options())(init=init)  # type: ignore[misc]
    model = make(tiny(linear=linear, init_std=0.05, **{linear: options}))
    found = [module for module in model.modules() if hasattr(module, "A")]
    assert len(found) == 7 * (3 if linear == "lowrank" else 2)
    for module in found:
        a, b = module.A.detach(), module.B.detach()
        is_zero = bool((b == 0).all())
        gram_a, gram_b = a.T @ a, b @ b.T
        is_spectral = bool((gram_a - gram_b).abs().max() < 1e-6)
        assert (is_zero, is_spectral) == (init == "zero-b", init == "spectral")


def test_shapes_and_initial_beta():
    model = make(tiny(crnet=CRNetOptions(beta_init=-0.3)))
    module = model.model.blocks()[1].maps["k"]
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "A": (16, 4),
        "B": (4, 8),
        "beta": (1,),
    }
    betas = [p for n, p in model.named_parameters() if n.endswith(".beta")]
    assert len(betas) == 2 * 7
    for beta in betas:
        assert beta.requires_grad
        assert torch.equal(beta, torch.tensor([-0.3]))


def test_fixed_beta_is_not_trained():
    model = make(tiny(crnet=CRNetOptions(learnable_beta=False, beta_init=0.5)))
    loss, _ = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    loss.backward()
    betas = {n: p for n, p in model.named_parameters() if n.endswith(".beta")}
    assert len(betas) == 14
    assert all(p.grad is None and p.tolist() == [0.5] for p in betas.values())
    assert all(p.grad is not None for n, p in model.named_parameters() if n not in betas)
    assert set(model.trained()) == {n for n, _ in model.named_parameters()} - set(betas)


# --- the gain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 1.0, 1e-9, 3.0, -0.5, -1e-9, -2.0])
def test_gain(beta: float):
    """sign(beta) (|beta| + eps), to one rounding of fp64; its derivative is exactly 1."""
    leaf = torch.tensor([beta], dtype=torch.float64, requires_grad=True)
    y = gain(leaf)
    y.sum().backward()
    expected = (1 if beta > 0 else -1) * (abs(beta) + EPS)
    assert EPS == 1e-6
    assert y.shape == (1,)
    assert y.item() == pytest.approx(expected, rel=2**-52, abs=0)
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [1.0]


def test_gain_of_zero_can_leave_it():
    leaf = torch.zeros(1, requires_grad=True)
    y = gain(leaf)
    y.sum().backward()
    assert y.tolist() == [0.0]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [1.0]


# --- what equals what ---------------------------------------------------------------------------


def with_dense_weights(linear: str, full: LanguageModel) -> LanguageModel:
    """A model of ranks so high that its factors' products are the weights of ``full``.

    D <= F: A = I, B = W^T; else A = W^T, B = I. For CR-Net beta = 0.
    """
    config = dataclasses.replace(full.spec.config, linear=linear, rank="16/k=8/v=8")
    model = make(config, seed=1).double()
    state = full.state_dict()
    for name in model.state_dict():
        if name.endswith(".beta"):
            state[name] = torch.zeros(1)
        elif name.endswith(".A"):
            weight = state.pop(name[:-1] + "weight")  # (F, D)
            wide = weight.shape[0] >= weight.shape[1]
            eye = torch.eye(min(weight.shape))
            state[name], state[name[:-1] + "B"] = (eye, weight.T) if wide else (weight.T, eye)
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("linear", ["crnet", "lowrank", "resformer"])
def test_equals_full_rank(linear: str):
    """Same logits and same gradients of all that both models have, fp64: 1e-12 for the reordering.

    The factors' gradients follow from the dense one: with A = I dB = dW^T, with B = I dA = dW^T.
    """
    full = make(tiny(linear="full", init_std=0.3)).double()
    other = with_dense_weights(linear, full)
    tokens = torch.randint(0, 31, (2, 9), generator=generator())
    probe = torch.randn(2, 9, 31, generator=generator(), dtype=torch.float64)
    logits = {}
    for model in (full, other):
        logits[model] = model.logits(tokens)
        (logits[model] * probe).sum().backward()

    def near(actual: Tensor | None, expected: Tensor | None) -> None:
        assert actual is not None
        assert expected is not None
        assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-12

    near(logits[other].detach(), logits[full].detach())
    dense = dict(full.named_parameters())
    compared = set()
    for name, parameter in other.named_parameters():
        kind = name.rpartition(".")[2]
        if kind == "weight":
            near(parameter.grad, dense[name].grad)
            compared.add(name)
        elif kind in "AB":
            partner = dict(other.named_parameters())[name[:-1] + "AB"["BA".index(kind)]]
            if torch.equal(partner, torch.eye(len(partner), dtype=torch.float64)):
                weight = name[:-1] + "weight"
                grad = dense[weight].grad
                assert grad is not None
                near(parameter.grad, grad.T)
                compared.add(weight)
        else:  # beta: it would carry the block below, and wants to
            assert parameter.grad is not None
            assert parameter.grad.item() != 0
    assert compared == set(dense)


def test_zero_b_starts_from_the_carry_alone():
    """With B = 0 a map returns gain x carry, to the bit, and hands on what it returns."""
    model = make(tiny(crnet=CRNetOptions(init="zero-b", beta_init=-0.7)))
    module = model.model.blocks()[1].maps["q"]
    x, carry = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    output, handed = module(x, carry)
    assert torch.equal(output, carry * gain(module.beta))
    assert torch.equal(handed, output)


@pytest.mark.parametrize("linear", ["full", "lowrank", "crnet", "resformer"])
def test_the_dense_weight_is_the_map(linear: str):
    """Without its carry; 1e-5 of the largest item: fp32 sums of 24 products in another order."""
    for block in make(tiny(linear=linear)).model.blocks():
        for module in block.maps.values():
            weight = module.dense_weight()
            x = torch.randn(2, 3, weight.shape[1])
            carry = torch.zeros(2, 3, weight.shape[0])
            assert error(module(x, carry)[0], x @ weight.T) < 1e-5


# --- published sizes ----------------------------------------------------------------------------


def published(preset: str, **changes: Any) -> ModelSpec:
    config = dataclasses.replace(presets.get(preset).model, vocab_size=32_000, **changes)
    return model_spec(config)


def total(spec: ModelSpec, *without: str) -> int:
    return sum(it.num_items for it in spec.tensors.values() if it.role not in without)


@pytest.mark.parametrize(
    ("preset", "rank", "ranks", "printed", "digits"),
    [
        ("llama-60m", "aligned-parameters", [96] * 3 + [112] * 4, 43.1, 1),
        ("llama-60m", "aligned-memory", [96] * 3 + [112] * 4, 43.1, 1),
        ("llama-130m", "aligned-parameters", [192] * 3 + [224] * 8, 90.8, 1),
        ("llama-130m", "aligned-memory", [192] * 3 + [256] * 8, 94.5, 1),
        ("llama-350m", "aligned-parameters", [224] * 15 + [256] * 8, 183.4, 1),
        ("llama-350m", "aligned-memory", [384] * 23, 250.1, 1),
        ("llama-1b", "aligned-parameters", [448] * 23, 582.3, 1),
        ("llama-1b", "aligned-memory", [768] * 23, 868.7, 1),
        ("llama-7b", "aligned-parameters", [896] * 31, 2633, 0),
        ("llama-13b", "aligned-parameters", [1260] * 39, 5423, 0),
    ],
)
def test_published_crnet_sizes(
    preset: str, rank: str, ranks: list[int], printed: float, digits: int
):
    """Table 10's ranks, exactly; their totals as printed, in millions, norms left out.

    2 V h + 4 h^2 + 3 h f + sum over blocks of r (11 h + 3 f), which leaves the seven betas of each
    block out as well.
    """
    spec = published(preset, linear="crnet", rank=rank)
    h, f = spec.shape.hidden_size, spec.shape.intermediate_size
    for block, expected_rank in zip(spec.slots, [0, *ranks], strict=True):
        assert {slot.rank for slot in block} == {expected_rank}
    # An independent count: r (D + F) summed over the seven positions is r (11 h + 3 f).
    expected = 2 * 32_000 * h + 4 * h * h + 3 * h * f + sum(ranks) * (11 * h + 3 * f)
    assert total(spec, "norm", "gain") == expected
    assert total(spec, "norm") == expected + 7 * len(ranks)
    assert round(expected / 1e6, digits) == printed


@pytest.mark.parametrize(
    ("preset", "rank", "printed"),
    [
        ("llama-60m", 128, 42.77),
        ("llama-130m", 256, 94.00),
        ("llama-350m", 256, 185.22),
        ("llama-1b", 512, 609.31),
        ("llama-7b", 1024, 2820.94),
    ],
)
def test_published_lowrank_sizes(preset: str, rank: int, printed: float):
    """2 V h + L (2 h) + h + L r (8 h + 3 (h + f)), norms included."""
    spec = published(preset, linear="lowrank", rank="aligned-parameters")
    h, f, layers = spec.shape.hidden_size, spec.shape.intermediate_size, spec.num_layers
    count = total(spec)
    assert count == 2 * 32_000 * h + layers * (2 * h + rank * (11 * h + 3 * f)) + h
    assert round(count / 1e6, 2) == printed


@pytest.mark.parametrize(("name", "rank"), [("llama-70b", 8192 // 4), ("llama3-1b", 448)])
def test_other_published_ranks(name: str, rank: int):
    """Appendix G: a quarter of the width at 70B. Appendix E.3: 448 at 1B with grouped heads."""
    slots = itertools.chain(*published(name, linear="crnet").slots[1:])
    assert {slot.rank for slot in slots} == {rank}


@pytest.mark.parametrize("linear", linears.names())
def test_published_ranks_can_be_read(linear: str):
    """Of every method, for the depth that their table speaks of."""
    method = linears.get(linear)
    for word, table in method.published_ranks.items():
        assert word.startswith("aligned-") or word in ("s1", "s2", "s3")
        for hidden_size, num_layers in table:
            changes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": 8}
            spec = model_spec(tiny(linear=linear, rank=word, num_kv_heads=None, **changes))
            assert all(slot.rank > 0 for slot in spec.slots[-1])


@pytest.mark.parametrize("linear", linears.names())
def test_gradients_that_meet_are_added_in_place(linear: str):
    """Autograd does so unless the first of them is a view. Of torch's own dense product it is: once
    for q k v, once for gate up. The first is that of the last map forward, v or up."""
    model = make(tiny(linear=linear, num_layers=4))
    last = [block.maps[name] for block in model.model.blocks() for name in ("v", "up")]
    tokens = torch.arange(12).view(2, 6)
    loss, _ = model(tokens, tokens)
    with torch.profiler.profile(record_shapes=True) as found:
        loss.backward()
    sums = [each for each in found.events() if each.name in ("aten::add", "aten::add_")]
    wide = [each.name for each in sums if len(each.input_shapes[0]) == 3]
    assert wide.count("aten::add_") > 2
    assert wide.count("aten::add") == sum(isinstance(each, DenseMap) for each in last)
