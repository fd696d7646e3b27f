"""The package's maps in transformers' LLaMA: the same numbers as in the package's own model.

Both models have the same weights, fp64, and transformers' norms are kept from rounding to fp32
(``test_model.norm_without_rounding``): 1e-8, as full rank has it against transformers.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import crnet
from crnet import linears
from crnet.config.sections import ModelConfig, options_of
from crnet.errors import ConfigError
from shapes import error, make, random_tokens, randomised, tiny
from test_model import llama, norm_without_rounding

pytestmark = pytest.mark.slow

ALL = [
    (name, linears.get(name).Options and linears.get(name).Options()) for name in linears.names()
]
TRAINED_ALONE = [name for name, options in ALL if not linears.get(name).has_events(options)]
"""Those that want nothing between two steps."""
CASES = [(name, {}) for name in TRAINED_ALONE]
CASES += [
    (name, vars(example))
    for name in TRAINED_ALONE
    for example in linears.get(name).examples
    if not linears.get(name).has_events(example)
]
TOLERANCE = 1e-8


def case_name(case: Any) -> str:
    if isinstance(case, dict):
        return ",".join(f"{key}={value}" for key, value in case.items()) or "defaults"
    return str(case)


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def exact(transformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(norm, "forward", norm_without_rounding)


def configured(name: str, options: dict[str, Any]) -> ModelConfig:
    plain = tiny(linear=name)
    kind = linears.get(name).Options
    changed = {name.replace("-", "_"): kind(**options)} if kind and options else {}
    return tiny(linear=name, num_kv_heads=None, **changed) if changed else plain


def converted(transformers: ModuleType, config: ModelConfig, **changes: Any) -> Any:
    theirs = llama(transformers, config)
    options = options_of(config, config.linear)
    keys = {"linear": config.linear, "rank": config.rank, **(vars(options) if options else {})}
    return crnet.convert_linears(theirs, **keys | changes)


def both(transformers: ModuleType, config: ModelConfig) -> tuple[Any, Any]:
    """The package's model far from its start, and theirs with its weights."""
    ours = randomised(make(config))
    theirs = converted(transformers, config).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def same_gradients(found: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert error(found[name], gradient) < tolerance, name


# The same model


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_name)
@pytest.mark.usefixtures("exact")
def test_logits_and_gradients_are_the_packages(
    transformers: ModuleType, name: str, options: dict[str, Any]
) -> None:
    config = configured(name, options)
    ours, theirs = both(transformers, config)
    tokens = random_tokens(2, 9)
    probe = torch.randn(2, 9, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits, wanted = theirs(tokens).logits, ours.logits(tokens)
    # fp32 carries of an fp64 model are rounded where they travel, on both sides alike.
    assert error(logits, wanted) < TOLERANCE
    for each in (logits, wanted):
        (each * probe).sum().backward()
    found = gradients(theirs)
    assert any(gradient is not None for gradient in found.values())
    same_gradients(found, gradients(ours), TOLERANCE)


@pytest.mark.parametrize("name", TRAINED_ALONE)
def test_initial_values_are_the_packages(transformers: ModuleType, name: str) -> None:
    """Bit for bit, from the same seed; what does not train does not."""
    config = configured(name, {})
    ours = dict(make(config, seed=3).named_parameters())
    theirs = dict(converted(transformers, config, seed=3).named_parameters())
    assert theirs.keys() == ours.keys()
    maps = [name for name in ours if "_proj." in name]
    assert maps
    for each in maps:
        assert torch.equal(theirs[each], ours[each]), each
        assert theirs[each].requires_grad == ours[each].requires_grad


def layouts(transformers: ModuleType) -> dict[str, Any]:
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    biased = transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
    return {
        "llama with biases": transformers.LlamaForCausalLM(biased),
        "mistral": transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, head_dim=8)),
        "qwen2": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)),
        "qwen3": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=8)),
        "base model": transformers.LlamaModel(transformers.LlamaConfig(**sizes)),
    }


def test_other_models_of_the_layout_are_as_if_their_maps_were_written_out(
    transformers: ModuleType,
) -> None:
    """CR-Net's first block is theirs with other weights; the second one's maps are eq. 6: by hooks
    on plain linear maps that write it out, the same hidden states, to fp32's rounding."""
    for name, model in layouts(transformers).items():
        plain = copy.deepcopy(model).eval()
        model = crnet.convert_linears(model, rank=4, keep_weights=True, beta_init=0.7).eval()
        outputs: dict[str, Tensor] = {}
        for idx, block in enumerate(getattr(plain, "model", plain).layers):
            other = getattr(model, "model", model).layers[idx]
            for path, module in block.named_modules():
                if type(module) is nn.Linear:
                    new = other.get_submodule(path)
                    module.register_forward_hook(
                        functools.partial(eq_6, path=path, new=new, outputs=outputs, first=not idx)
                    )
                    if module.bias is not None:
                        assert not new.bias.any(), (name, path)
        tokens = random_tokens(2, 5)
        found, wanted = (each(tokens, use_cache=False)[0] for each in (model, plain))
        assert outputs
        assert error(found, wanted) < 1e-5, name


def eq_6(
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
    *,
    path: str,
    new: Any,
    outputs: dict[str, Tensor],
    first: bool,
) -> Tensor:
    """The output of the map that stands for ``module``, from the outputs noted below."""
    (x,) = args
    if first:
        bias = module.bias if module.bias is not None else 0  # a fresh map's is 0
        outputs[path] = output - bias
    else:
        outputs[path] = (new.beta + 1e-6) * outputs[path] + x @ new.A @ new.B
    return outputs[path]


def test_keep_weights(transformers: ModuleType) -> None:
    """LoRA's frozen matrix is the one that was there: the model does what it did."""
    config = tiny(linear="lora")
    theirs = llama(transformers, config).eval()
    tokens = random_tokens(2, 7)
    before = theirs(tokens).logits
    frozen = theirs.model.layers[1].mlp.up_proj.weight.detach().clone()
    crnet.convert_linears(theirs, "lora", rank=4, keep_weights=True)
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, frozen)
    assert not theirs.model.layers[1].mlp.up_proj.weight.requires_grad
    assert error(theirs(tokens).logits, before) < 1e-6  # one addition of zeros more
    with pytest.raises(ConfigError, match="keep_weights has no effect: no map of lowrank"):
        crnet.convert_linears(llama(transformers, config), "lowrank", keep_weights=True)


# Passes


@pytest.fixture(params=["crnet", "resformer", "lax", "value-resformer"])
def pair(request: pytest.FixtureRequest, transformers: ModuleType, exact: None) -> tuple[Any, Any]:
    """Those whose maps read earlier blocks."""
    return both(transformers, configured(request.param, {}))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return (model(tokens, use_cache=False).logits ** 2).mean()


def test_checkpointed_blocks_have_the_same_gradients(pair: tuple[Any, Any]) -> None:
    """Two passes before one backward: each block runs again with the carries of its own pass."""
    _, model = pair
    batches = [random_tokens(2, 6, seed=seed) for seed in (1, 2)]
    sum(loss_of(model, each) for each in batches).backward()  # type: ignore[union-attr]
    wanted = gradients(model)
    model.train()
    model.activation_checkpointing_enable()
    ran = []
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: ran.append(1))
    sum(loss_of(model, each) for each in batches).backward()  # type: ignore[union-attr]
    assert len(ran) == 4  # each pass twice
    hook.remove()
    same_gradients(gradients(model), wanted, 1e-12)


def test_own_checkpoints_around_blocks_work_too(pair: tuple[Any, Any]) -> None:
    _, model = pair
    tokens = random_tokens(2, 6)
    loss_of(model, tokens).backward()
    wanted = gradients(model)
    for block in model.model.layers:
        inner = block.forward
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, inner, use_reentrant=False
        )
    loss_of(model, tokens).backward()
    same_gradients(gradients(model), wanted, 1e-12)


def test_reentrant_checkpoints_are_refused(pair: tuple[Any, Any]) -> None:
    """They lose the carries: an error, never other gradients."""
    _, model = pair
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    embedded = model.get_input_embeddings()(random_tokens(2, 6))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        (model(inputs_embeds=embedded, use_cache=False).logits ** 2).mean().backward()


@pytest.mark.parametrize("with_gradients", [True, False])
def test_nothing_is_held_after_a_pass(pair: tuple[Any, Any], with_gradients: bool) -> None:
    """Neither by the model nor by hidden states that the caller keeps without gradients."""
    _, model = pair
    handed: list[weakref.ref[Tensor]] = []
    for block in model.model.layers:
        for position in ("q_proj", "v_proj"):
            block.self_attn.get_submodule(position).register_forward_hook(
                lambda module, args, output: handed.append(weakref.ref(output))
            )
    with torch.set_grad_enabled(with_gradients):
        outputs = model(random_tokens(2, 6), use_cache=False, output_hidden_states=True)
        if with_gradients:
            outputs.logits.sum().backward()
            model.zero_grad()
            del outputs
    gc.collect()
    assert len(handed) == 6
    assert [each for each in handed if each() is not None] == []


def test_a_pass_that_fails_leaves_nothing(pair: tuple[Any, Any]) -> None:
    _, model = pair
    tokens = random_tokens(2, 6)
    wanted = model(tokens).logits
    fails = model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(random_tokens(3, 4))
    fails.remove()
    assert torch.equal(model(tokens).logits, wanted)


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def test_passes_do_not_mix(pair: tuple[Any, Any]) -> None:
    """One model called inside a pass of itself, by a hook between two blocks."""
    _, model = pair
    tokens, other = random_tokens(2, 6), random_tokens(1, 3, seed=9)
    wanted, wanted_inside = model(tokens).logits, model(other).logits
    inside: list[Tensor] = []

    def call_inside(*_: Any) -> None:
        if not inside:
            inside.append(torch.empty(0))
            inside.append(model(other).logits)

    hook = model.model.layers[0].register_forward_hook(call_inside)
    assert torch.equal(model(tokens).logits, wanted)
    assert torch.equal(inside[1], wanted_inside)
    hook.remove()


def test_a_block_alone_says_what_it_lacks(pair: tuple[Any, Any]) -> None:
    _, model = pair
    hidden = torch.randn(2, 6, 16, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, torch.arange(6)[None])
    with pytest.raises(RuntimeError, match="blocks have to be called in turn"):
        model.model.layers[1](hidden, position_embeddings=rotary)


def test_generate_with_a_cache_is_without(pair: tuple[Any, Any]) -> None:
    ours, model = pair
    model.eval()
    prompt = random_tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    greedy = ours.logits(cached[:, :-1]).argmax(-1)[:, 4:]
    assert torch.equal(cached[:, 5:], greedy)


def test_copies_and_pickles(pair: tuple[Any, Any]) -> None:
    _, model = pair
    tokens = random_tokens(2, 6)
    wanted = model(tokens).logits
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (copy.deepcopy(model), torch.load(whole, weights_only=False)):
        assert torch.equal(other(tokens).logits, wanted)
        with torch.no_grad():
            next(other.model.layers[0].self_attn.v_proj.parameters()).mul_(2)
        assert not torch.equal(other(tokens).logits, wanted)
        assert torch.equal(model(tokens).logits, wanted)


# Training


def learnable(seed: int) -> Tensor:
    """Rows of one repeated pattern each."""
    return random_tokens(4, 4, seed=seed).repeat(1, 4)


@pytest.mark.parametrize("name", TRAINED_ALONE)
def test_ten_steps_lower_the_loss(transformers: ModuleType, name: str) -> None:
    model = converted(transformers, configured(name, {}))
    optimizer = torch.optim.AdamW(crnet.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(10):
        loss = model(learnable(0), labels=learnable(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_parameter_groups_have_the_rates_of_training(transformers: ModuleType) -> None:
    """As the package's optimizer has them, parameter by parameter."""
    config = configured("crnet", {})
    ours, theirs = make(config), converted(transformers, config)
    for model in (ours, theirs):
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = {
            names[parameter]: (group["lr"], group["weight_decay"])
            for group in crnet.parameter_groups(model, lr=1.0, weight_decay=0.5)
            for parameter in group["params"]
        }
        assert found == {
            name: (spec.lr_factor, 0.5 if spec.decays else 0.0)
            for name, (spec, _) in ours.trained().items()
        }


def test_trainer_trains_and_saves(transformers: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    config = configured("crnet", {})
    model = converted(transformers, config)
    rows = [{"input_ids": row, "labels": row} for row in learnable(1)] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        activation_checkpointing=True,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "model"))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model" / "model.safetensors")
    other = converted(transformers, config, seed=1)
    other.load_state_dict(saved, strict=True)
    tokens = random_tokens(2, 5)
    model.eval()
    assert torch.equal(other.eval()(tokens).logits, model(tokens).logits)
    again = transformers.Trainer(model=other, args=arguments, train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert again.state.global_step == 6
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"linear": "relora"}, "relora changes its weights and its optimizer's state between"),
        ({"linear": "crent"}, "linear is 'crent'; known are"),
        ({"rank": 17}, "--model.rank 17 gives rank 17 to"),
        ({"rank": "4x5"}, "--model.rank 4x5 gives 5 ranks, but 2 blocks are low rank"),
        ({"betas": 1.0}, "unknown key crnet.betas"),
        ({"linear": "full", "beta_init": 1.0}, "full has no options"),
        ({"learnable_beta": False, "beta_init": 0.0}, "with a fixed beta is plain low rank"),
    ],
)
def test_what_cannot_be_had_is_refused(
    transformers: ModuleType, keys: dict[str, Any], message: str
) -> None:
    """And the model is as it was."""
    model = llama(transformers, tiny())
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError) as caught:
        crnet.convert_linears(model, **{"rank": 4, **keys})
    assert message in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_other_layouts_are_refused(transformers: ModuleType) -> None:
    model = llama(transformers, tiny())
    crnet.convert_linears(model, rank=4)
    with pytest.raises(ConfigError, match="already; convert once"):
        crnet.convert_linears(model, rank=4)
    with pytest.raises(ConfigError, match=r"has no blocks at model\.layers"):
        crnet.convert_linears(nn.Linear(2, 2))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2)
    )
    with pytest.raises(ConfigError, match="has no blocks"):
        crnet.convert_linears(gpt2)
    with torch.device("meta"):
        empty = llama(transformers, tiny())
    with pytest.raises(ConfigError, match="is on meta; give the model memory first"):
        crnet.convert_linears(empty, rank=4)


def test_bf16(transformers: ModuleType) -> None:
    """Maps in the model's dtype, gains in fp32; autocast computes as in the package's own model."""
    model = crnet.convert_linears(llama(transformers, tiny()).to(torch.bfloat16), rank=4)
    up = model.model.layers[1].mlp.up_proj
    assert (up.A.dtype, up.beta.dtype) == (torch.bfloat16, torch.float32)
    assert model(random_tokens(2, 5)).logits.dtype == torch.bfloat16
