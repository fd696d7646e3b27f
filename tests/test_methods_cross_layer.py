"""Rivals that reach across layers: one matrix for all blocks (``shared``), sums of all blocks'
outputs (``denseformer``), averages of groups of them (``attnres``), the
first block's values (``value-resformer``).

Each against a plain formula written from its paper, in fp64; a tolerance is relative to the largest
item and stands for the order of sums.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from crnet import linears
from crnet.config.check import check
from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig, RunConfig
from crnet.cost.parameters import num_parameters
from crnet.errors import ConfigError
from crnet.layers.projector import Projector
from crnet.linears._maps import SharedTensors
from crnet.linears.lora import SharedOptions
from crnet.linears.value_resformer import ValueResFormerOptions
from crnet.measure.memory import saved_bytes
from crnet.model.language_model import LanguageModel
from crnet.recompute.plan import RecomputePlan
from crnet.specs import Slot
from crnet.streams.attnres import AttentionResidualsOptions
from crnet.streams.attnres.module import naive_average
from crnet.streams.denseformer import DenseFormerOptions
from crnet.streams.denseformer.module import mix, naive_mix
from shapes import error, make, random_tokens, randomised, tiny

EXACT = 1e-12
"""Of fp64."""
Grads = dict[str, Tensor]


def gradients(model: LanguageModel) -> tuple[Tensor, Grads]:
    """Loss of a batch, and the gradient of every trained tensor."""
    model.zero_grad()
    tokens = random_tokens(2, 9)
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    total.backward()
    found = {name: tensor.grad for name, (_, tensor) in model.trained().items()}
    return total.detach(), {name: grad for name, grad in found.items() if grad is not None}


# --- shared ---------------------------------------------------------------------------------------

SHARED = tiny(linear="shared", shared=SharedOptions(scale=1.5))
POSITIONS = ("q", "k", "v", "o", "gate", "up", "down")


def shared_model(dtype: torch.dtype = torch.float64) -> LanguageModel:
    """None of its tensors is at its first value."""
    return randomised(make(SHARED), dtype)


def test_a_shared_map_is_its_formula():
    """``x W^T + scale (x A) B`` and every gradient, W's too; as a node made from known results."""
    slot, options = Slot("v", 1, 3, 12, 20, 4, 0.02), SharedOptions(scale=1.5)
    method = linears.get("shared")
    linear, holder = method.make(slot, options), SharedTensors(method.shared(slot, options))
    linear.share(holder)
    generator = torch.Generator().manual_seed(0)
    leaves = [*holder.double().parameters(), *linear.double().parameters()]
    for leaf in leaves:
        leaf.data.normal_(generator=generator)
    x = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64).requires_grad_()
    dy = torch.randn(2, 5, 20, generator=generator, dtype=torch.float64)

    def found(y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad((y * dy).sum(), [x, *leaves])]

    weight, a, b = leaves
    wanted = found(x @ weight.T + 1.5 * (x @ a @ b))
    with torch.no_grad():
        bottleneck = linear.down_project(x, None)
        known = bottleneck, linear.up_project(bottleneck, None)
    for actual in (found(linear(x, None)[0]), found(linear.run(x, None, known)[0])):
        assert all(error(*pair) < EXACT for pair in zip(actual, wanted, strict=True))


@torch.no_grad()
def _tied(model: LanguageModel) -> LanguageModel:
    """A full-rank model whose blocks have the shared matrices."""
    dense = make(tiny(linear="full")).double()
    for name, parameter in dense.named_parameters():
        parameter.copy_(model.get_parameter(_source(name)))
    return dense


def _source(name: str) -> str:
    """Name in a shared model of what a dense one has at ``name``."""
    for position in make(SHARED).spec.positions:
        if f".{position.module}." in name:
            return f"model.shared_tensors.{position.name}.weight"
    return name


def test_without_an_update_blocks_are_tied():
    """B = 0: logits of full rank with one matrix a position; W's gradient is the sum of theirs."""
    model = shared_model()
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.zero_()
    dense = _tied(model)
    (loss, found), (tied_loss, tied) = gradients(model), gradients(dense)
    assert error(loss, tied_loss) < EXACT
    sums: Grads = {}
    for name, grad in tied.items():
        sums[_source(name)] = sums.get(_source(name), torch.zeros_like(grad)) + grad
    assert len([name for name in sums if name.startswith("model.shared_tensors.")]) == len(
        POSITIONS
    )
    for name, grad in sums.items():
        assert error(found[name], grad) < EXACT, name


def test_an_update_is_one_more_matrix():
    """With B: logits of full rank with ``W + scale (A B)^T`` in each block, which export writes."""
    model = shared_model()
    dense = make(tiny(linear="full")).double()
    maps = {name: model.get_submodule(name) for name in model.spec.slot_of}
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            owner = name.removesuffix(".weight")
            parameter.copy_(maps[owner].merged() if owner in maps else model.get_parameter(name))  # type: ignore[operator]
    tokens = random_tokens(2, 9)
    assert error(model.logits(tokens), dense.logits(tokens)) < EXACT


def test_the_model_has_a_shared_matrix_once():
    """In its list, its state dict and its cost; every block reads the same tensor."""
    model = shared_model()
    names = [name for name in model.state_dict() if name.startswith("model.shared_tensors.")]
    assert names == [f"model.shared_tensors.{position}.weight" for position in POSITIONS]
    assert list(model.state_dict()).count(names[0]) == 1
    assert set(names) == set(model.spec.shared)
    for position in POSITIONS:
        read = {id(block.maps[position].matrix()) for block in model.model.blocks()}
        assert read == {id(model.get_parameter(f"model.shared_tensors.{position}.weight"))}
    counts = num_parameters(model.spec)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["up"] == 16 * 24 + 3 * 4 * (16 + 24)
    assert not model.get_parameter("model.layers.1.mlp.up_proj.B").equal(torch.zeros(4, 24))


@pytest.mark.parametrize("init", ["zero-b", "balanced"])
def test_initial_factors(init: Any):
    """zero-b: all blocks are alike at first; balanced: none is."""
    model = make(tiny(linear="shared", shared=SharedOptions(init=init)))
    up = [block.maps["up"].dense_weight() for block in model.model.blocks()]
    assert torch.equal(up[0], up[1]) == (init == "zero-b")


def test_a_shared_matrix_that_changes_is_found_out():
    """Under replay, which runs blocks once more with it."""
    model, tokens = shared_model(torch.float32), random_tokens(2, 9)
    model.recompute(RecomputePlan("replay"))
    total, _ = model(tokens[:, :-1], tokens[:, 1:])
    model.get_parameter("model.shared_tensors.down.weight").data[0, 0] += 1
    with pytest.raises(RuntimeError, match="weights were changed"):
        total.backward()


def test_a_shared_matrix_takes_its_place_anew():
    """A copy of the model reads its own matrices, and so does one cast to another dtype."""
    model = shared_model()
    tokens, other = random_tokens(2, 9), copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("model.shared_tensors.q.weight").zero_()
        assert not torch.equal(other.logits(tokens), model.logits(tokens))
    assert model.float().logits(tokens).dtype == torch.float32


def test_shared_refusals():
    run = RunConfig(model=SHARED)
    train = dataclasses.replace(run.train, batch_size=4, micro_batch_size=1)
    piped = dataclasses.replace(run.parallel, pipeline=2)
    with pytest.raises(ConfigError, match="all blocks read one matrix a position"):
        check(dataclasses.replace(run, train=train, parallel=piped))
    with pytest.raises(ConfigError, match=r"model\.shared\.scale is 0"):
        check(dataclasses.replace(run, model=tiny(linear="shared", shared=SharedOptions(scale=0))))


# --- denseformer ----------------------------------------------------------------------------------

DEEP = tiny(linear="lowrank", num_layers=5)
SPACED = [(1, 1), (2, 1), (1, 2), (2, 3), (4, 1)]
"""Dilation and period."""
each_spacing = pytest.mark.parametrize(("dilation", "period"), SPACED)


def dense_former(dilation: int, period: int, **changes: Any) -> ModelConfig:
    options = DenseFormerOptions(dilation=dilation, period=period)
    return dataclasses.replace(DEEP, stream="denseformer", denseformer=options, **changes)  # type: ignore[call-arg]


def naive_dense_former(model: LanguageModel, tokens: Tensor, dilation: int, period: int) -> Tensor:
    """Logits by the paper's formula: ``X_i <- sum alpha_ij X_j``, outputs kept unmixed."""
    backbone, spec = model.model, model.spec
    context = spec.architecture.context(
        spec.shape, spec.architecture_options, 0, tokens.shape[1], tokens.device, None
    )
    x = spec.architecture.embed(backbone, tokens, 0)
    outputs = [x]
    for block in backbone.blocks():
        projector = Projector(block.maps, {}, ())
        for sublayer in block.sublayers():
            x = x + sublayer(x, projector, context)
        outputs.append(x)
        i, weights = len(outputs) - 1, cast("Any", block.streams[-1])
        if i % period == 0:
            terms = [j for j in range(i) if j % dilation == i % dilation]
            x = weights.own * outputs[i]
            for n, j in enumerate(terms):
                x = x + weights.others[n] * outputs[j]
    return model.lm_head(backbone.norm(x))


@each_spacing
def test_denseformer_is_its_formula(dilation: int, period: int):
    """Logits and every gradient in fp64, the weights far from their first values."""
    model = randomised(make(dense_former(dilation, period)))
    tokens = random_tokens(2, 7)
    found = []
    for logits in (model.logits(tokens), naive_dense_former(model, tokens, dilation, period)):
        model.zero_grad()
        logits.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(grads) == len(list(model.parameters()))
        found.append([logits.detach(), *grads])
    assert all(error(*pair) < 1e-10 for pair in zip(*found, strict=True))


@each_spacing
@pytest.mark.parametrize("linear", ["lowrank", "full", "crnet"])
def test_denseformer_begins_as_the_model_without(dilation: int, period: int, linear: str):
    """Bit for bit."""
    tokens = random_tokens(2, 7)
    model = make(dense_former(dilation, period, linear=linear))
    plain = make(dataclasses.replace(DEEP, linear=linear))
    assert torch.equal(model.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize(("layers", "weights"), [(8, 44), (12, 90), (24, 324), (32, 560)])
def test_weights_of_denseformer(layers: int, weights: int):
    """Their number, and that none decays."""
    tensors = model_spec(dense_former(1, 1, num_layers=layers)).tensors
    mixing = [spec for name, spec in tensors.items() if ".streams." in name]
    assert sum(spec.num_items for spec in mixing) == weights
    assert not any(spec.decays for spec in mixing)
    assert all(spec.role == "gain" for spec in mixing)


@each_spacing
def test_kept_bytes_of_denseformer(dilation: int, period: int):
    """Beside what the model without it keeps: the output of each block behind which there is a sum.
    Counted; the declared bytes are compared by the contract."""
    tokens = random_tokens(2, 7)
    kept = [
        saved_bytes(make(config), tokens, tokens)
        for config in (dense_former(dilation, period), DEEP)
    ]
    assert kept[0] - kept[1] == 5 // period * tokens.numel() * DEEP.hidden_size * 4


def test_what_no_later_sum_reads_is_not_held():
    """The state before each block: the stream, and the outputs that sums to come are made of."""
    counts = {}
    for dilation, period in SPACED:
        spec = model_spec(dense_former(dilation, period))
        shape, options = spec.shape, spec.stream_options
        where = [(2 * block, spec.num_sublayers, shape, options, 4, ()) for block in range(5)]
        counts[dilation, period] = [len(spec.stream.crossing(*each)) for each in where]
    # Sums behind blocks 1 to 5, of 0 1 2 3 4 5 counted from the embedding.
    assert counts[1, 1] == [2, 3, 4, 5, 6]
    assert counts[2, 1] == [2, 3, 4, 5, 3]  # the last reads 1, 3 (and 5)
    assert counts[1, 2] == [2, 3, 4, 5, 1]  # behind 2 and 4
    assert counts[2, 3] == [1, 2, 2, 1, 1]  # behind 3, of 1 (and 3)
    assert counts[4, 1] == [2, 3, 3, 3, 2]  # behind 4 of 0, behind 5 of 1


@pytest.mark.parametrize("others", [0, 1, 3])
def test_mix_gradcheck(others: int):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    outputs = [drawn(2, 3, 4) for _ in range(others + 1)]
    weights = drawn(1), drawn(others) if others else None
    torch.testing.assert_close(mix(outputs, *weights), naive_mix(outputs, *weights))
    inputs: Any = (*weights, *outputs)
    assert torch.autograd.gradcheck(lambda own, more, *x: mix(x, own, more), inputs)


def test_denseformer_refusals():
    with pytest.raises(ConfigError, match=r"denseformer\.period is 0; take 1 or more"):
        check(RunConfig(model=dense_former(1, 0)))
    depth = DEEP.num_layers
    check(RunConfig(model=dense_former(1, depth)))
    with pytest.raises(ConfigError, match=f"no sum would be made; take at most {depth}"):
        check(RunConfig(model=dense_former(1, depth + 1)))


# --- attnres in groups ----------------------------------------------------------------------------

each_group = pytest.mark.parametrize("group", [1, 2, 3, 4, 99])


def grouped(group: int, **changes: Any) -> ModelConfig:
    options = AttentionResidualsOptions(group=group)
    return dataclasses.replace(DEEP, stream="attnres", attnres=options, **changes)  # type: ignore[call-arg]


def naive_groups(model: LanguageModel, tokens: Tensor, group: int) -> Tensor:
    """Logits by the formula: a read averages the embedding and the sum of each group so far."""
    backbone, spec = model.model, model.spec
    context = spec.architecture.context(
        spec.shape, spec.architecture_options, 0, tokens.shape[1], tokens.device, None
    )
    outputs: list[Tensor] = []
    embedding = spec.architecture.embed(backbone, tokens, 0)

    def read(module: Any) -> Tensor:
        parts = [outputs[at : at + group] for at in range(0, len(outputs), group)]
        sources = [embedding, *(torch.stack(part).sum(0) for part in parts)]
        return naive_average(sources, module.weight, module.eps) if outputs else embedding

    for block in backbone.blocks():
        projector = Projector(block.maps, {}, ())
        for sublayer, module in zip(block.sublayers(), block.streams, strict=True):
            outputs.append(sublayer(read(module), projector, context))
    return model.lm_head(backbone.norm(read(backbone.last_read)))


@each_group
def test_groups_of_attention_residuals_are_their_formula(group: int):
    """Logits and every gradient in fp64."""
    model = randomised(make(grouped(group)))
    tokens = random_tokens(2, 7)
    found = []
    for logits in (model.logits(tokens), naive_groups(model, tokens, group)):
        model.zero_grad()
        logits.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(grads) == len(list(model.parameters()))
        found.append([logits.detach(), *grads])
    assert all(error(*pair) < 1e-9 for pair in zip(*found, strict=True))


def test_kept_bytes_of_groups():
    """Two fp32 numbers a row and source less for every source that a read has fewer; under block a
    tensor for each group that has ended or stands open between two blocks. Counted."""
    tokens, sublayers = random_tokens(2, 7), 10
    rows, size = tokens.numel(), tokens.numel() * DEEP.hidden_size * 4
    kept = {}
    for group in (1, 4):
        model = make(grouped(group))
        for policy in ("none", "block"):
            model.recompute(RecomputePlan(policy))
            kept[group, policy] = saved_bytes(model, tokens, tokens)
    fewer = sum(idx - -(-idx // 4) for idx in range(1, sublayers + 1))
    assert kept[1, "none"] - kept[4, "none"] == 8 * rows * fewer
    # All ten outputs, against groups that end behind sublayers 4 and 8 and open sums behind the
    # blocks 1, 3 and 5; the last read has 11 sources, against 4.
    assert kept[1, "block"] - kept[4, "block"] == (10 - 5) * size + 8 * rows * 7


def test_group_refusals():
    with pytest.raises(ConfigError, match=r"attnres\.group is 0; take 1 or more"):
        check(RunConfig(model=grouped(0)))


# --- value-resformer ------------------------------------------------------------------------------


def mixing(**options: Any) -> ModelConfig:
    made = ValueResFormerOptions(**options)
    return tiny(linear="value-resformer", num_layers=5, value_resformer=made)


def lambdas(model: LanguageModel) -> dict[str, Any]:
    return {name: spec for name, spec in model.spec.tensors.items() if ".lambda" in name}


def test_values_that_mix_in_nothing_are_those_of_llama():
    """lambda1 0 and lambda2 1: bit for bit; each block has its own numbers, which never decay."""
    model, plain = make(mixing(lambda1=0.0, lambda2=1.0)), make(tiny(linear="full", num_layers=5))
    tokens = random_tokens(2, 7)
    assert torch.equal(model.logits(tokens), plain.logits(tokens))
    found = lambdas(model)
    assert len(found) == 2 * 4
    assert not any(spec.decays for spec in found.values())
    assert all(spec.trained for spec in found.values())


def test_variants_of_value_resformer():
    """Fixed numbers are no part of what trains; named blocks mix alone."""
    fixed = make(mixing(lambda1=1.0, lambda2=1.0, learnable=False))
    assert {name for name in lambdas(fixed)}.isdisjoint(fixed.trained())
    assert float(fixed.get_parameter("model.layers.2.self_attn.v_proj.lambda1")) == 1.0
    sparse = lambdas(make(mixing(blocks="4,5")))
    assert {name.split(".")[2] for name in sparse} == {"3", "4"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"blocks": "1,6"}, "blocks 1,6: block 1, 6 is not one of 2 to 5"),
        ({"blocks": "top"}, "'top' cannot be read; write 6 or 6,7,8"),
        ({"learnable": False, "lambda1": 0.0}, "reads nothing of the first block"),
    ],
)
def test_value_resformer_refusals(options: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        check(RunConfig(model=mixing(**options)))
