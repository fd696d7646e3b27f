"""What transformers' Trainer, PEFT, torch.compile and engines do with the model."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet.config.sections import ModelConfig
from crnet.errors import ConfigError
from crnet.hub import files
from crnet.hub.names import own_names
from shapes import make, may_differ, one_of_every_method, random_tokens, randomised, tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODELS = one_of_every_method()
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def hf() -> Any:
    """The room; it imports transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import crnet.hf

        return crnet.hf


def model_of(hf: Any, config: ModelConfig) -> Any:
    model = hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(config)))
    model.load_state_dict(randomised(make(config), torch.float32).state_dict())
    return model


# transformers' Trainer


def trained(hf: Any, folder: Path, batch: int = 4, resume: bool = False, **more: Any) -> Weights:
    """Weights after six steps; rows have 0 to 7 labels that do not count."""
    import transformers

    transformers.set_seed(0)
    model = hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(tiny())))
    rows = []
    for idx, tokens in enumerate(random_tokens(24, 12).tolist()):
        left_out = idx % 8
        rows.append({"input_ids": tokens, "labels": [-100] * left_out + tokens[left_out:]})
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=6,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def differing(one: Weights, other: Weights) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_trainer(hf: Any, tmp_path: Path) -> None:
    """Resumed it is bit for bit the same; the loss is over all labels of a step, however it is cut
    (Tolerance: sums in another order); recomputation changes no bit."""
    pytest.importorskip("accelerate")
    whole = trained(hf, tmp_path)
    torch.manual_seed(0)
    start = dict(hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(tiny()))).named_parameters())
    assert len(differing(whole, start)) == len(whole)
    assert differing(whole, trained(hf, tmp_path, resume=True)) == []
    cut = trained(hf, tmp_path / "cut", batch=1, gradient_accumulation_steps=4)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=2e-4)
    for policy in ("block", "replay"):
        options = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"policy": policy},
        }
        assert differing(whole, trained(hf, tmp_path / policy, **options)) == [], policy


# PEFT

MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapters() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    return {
        "LoRA": peft.LoraConfig(r=2, target_modules=MAPS),
        "rsLoRA": peft.LoraConfig(r=2, target_modules=MAPS, use_rslora=True),
        "DoRA": peft.LoraConfig(r=2, target_modules=MAPS, use_dora=True),
        "RandLoRA": peft.RandLoraConfig(r=2, target_modules=MAPS),
        "IA3": peft.IA3Config(target_modules=MAPS, feedforward_modules=["down_proj"]),
        "OFT": peft.OFTConfig(target_modules=MAPS, oft_block_size=4, use_cayley_neumann=False),
        "LoHa": peft.LoHaConfig(r=2, target_modules=MAPS),
        "LoKr": peft.LoKrConfig(r=2, target_modules=MAPS),
        "AdaLoRA": peft.AdaLoraConfig(target_modules=MAPS, total_step=9, init_r=3, target_r=2),
        "HRA": peft.HRAConfig(r=2, target_modules=MAPS),
    }


NEEDS_MATRIX = {"DoRA", "AdaLoRA", "HRA"}
HAVE_MORE = (*("lora", "relora", "rso", "self-guided", "switchlora", "value-resformer", "velora"),)
"""Parameterizations with a matrix beside which their maps have more."""


@each_model
def test_adapters(hf: Any, config: ModelConfig, tmp_path: Path) -> None:
    """The table of docs/transformers.md: each starts as the model, trains, comes off, is saved and
    found again, and merges where the map is a matrix; or is refused, at the latest when called."""
    peft = pytest.importorskip("peft")
    tokens = random_tokens(2, 9)
    for name, options in adapters().items():
        model = hf.adaptable(model_of(hf, config).eval())
        before = model(tokens).logits
        if config.linear in HAVE_MORE:
            with pytest.raises((ValueError, TypeError), match=r"upported|No layers"):
                peft.get_peft_model(model, options)
            continue
        if config.linear != "full" and name in NEEDS_MATRIX:
            with pytest.raises(ConfigError, match="take one that adds"):
                peft.get_peft_model(model, options)(tokens)
            continue
        adapted = peft.get_peft_model(model, options)
        # HRA's reflections undo each other to rounding.
        close = {"rtol": 0, "atol": 1e-4}
        torch.testing.assert_close(adapted(tokens).logits, before, **close)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        after = adapted(tokens).logits
        assert float((after - before).abs().max()) > 1e-4, name
        with adapted.disable_adapter():
            assert torch.equal(adapted(tokens).logits, before), name
        if name == "LoRA":
            adapted.save_pretrained(tmp_path)
            fresh = hf.adaptable(model_of(hf, config).eval())
            back = peft.PeftModel.from_pretrained(fresh, tmp_path)
            # An expert's few rows are multiplied another way from other memory.
            rounding = 1e-5 if may_differ(config) else 0.0
            torch.testing.assert_close(back(tokens).logits, after, rtol=0, atol=rounding)
        if config.linear == "full":
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(tokens).logits, after, rtol=0, atol=1e-3)
        else:
            with pytest.raises(ConfigError, match="take one that adds"):
                adapted.merge_and_unload()


@torch.no_grad()
def test_an_adapter_is_as_if_the_rank_were_larger(hf: Any) -> None:
    """LoRA on every map of a CR-Net above the first block, beside the CR-Net whose factors have
    these columns and rows too: the carry has the update in it. Tolerance: rounding of sums."""
    peft = pytest.importorskip("peft")
    config = tiny(rank="4")
    model = model_of(hf, config).eval()
    options = peft.LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=MAPS,
        layers_to_transform=[1, 2],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(hf.adaptable(model_of(hf, config).eval()), options)
    wider = hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(tiny(rank="6")))).eval()
    weights = dict(adapted.base_model.model.named_parameters())
    for name, parameter in wider.named_parameters():
        owner, _, own = name.rpartition(".")
        if f"{owner}.lora_A.default.weight" not in weights:
            parameter.copy_(model.get_parameter(name))
            continue
        base = weights[f"{owner}.base_layer.{own}"]
        if own == "A":
            base = torch.cat([base, weights[f"{owner}.lora_A.default.weight"].T], 1)
        elif own == "B":
            base = torch.cat([base, weights[f"{owner}.lora_B.default.weight"].T], 0)
        parameter.copy_(base)
    tokens = random_tokens(2, 9)
    wanted = wider(tokens).logits
    assert float((wanted - model(tokens).logits).abs().max()) > 1
    torch.testing.assert_close(adapted(tokens).logits, wanted, rtol=1e-4, atol=1e-4)


# torch.compile


def test_compiled_in_one_graph(hf: Any) -> None:
    """Forward and backward, without a break. Tolerance: operations are taken apart."""
    torch._dynamo.reset()
    model = model_of(hf, tiny()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # the graph alone
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        found, wanted = compiled(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    model.train()
    compiled(tokens, labels=tokens).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    for each, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[each], parameter.grad, rtol=1e-4, atol=1e-5)


# Engines


@each_model
@torch.no_grad()
def test_what_an_engine_with_its_own_attention_finds(hf: Any, config: ModelConfig) -> None:
    """The checklist of vLLM's transformers backend, with an attention function that stands for
    vLLM's: built by ``AutoModel.from_config`` on meta, called with one flat row, positions, no
    cache and keywords of its own, by a function that is told of which layer it is asked."""
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    own = model_of(hf, config).eval()
    seen: list[int] = []

    def engine(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **words: Any) -> Any:
        assert words["scaling"] == own.config.head_dim**-0.5
        seen.append(words["attention_instances"][module.layer_idx])
        return sdpa_attention_forward(module, q, k, v, mask, **words)

    transformers.AttentionInterface.register("engine", engine)
    described = hf.CRNetConfig(**own.config.to_dict())
    described._attn_implementation = "engine"
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(described)
    assert type(base) is hf.CRNetModel
    assert not list(base.buffers())
    assert len(base.layers) == described.num_hidden_layers == len(own.model.layers)
    assert base._supports_attention_backend
    base.to_empty(device="cpu").eval()
    base.load_state_dict(own.model.state_dict())
    tokens = random_tokens(1, 9)
    instances = {idx: 10 + idx for idx in range(described.num_hidden_layers)}
    (found, *_) = base(
        input_ids=tokens,
        position_ids=torch.arange(9)[None],
        use_cache=False,
        return_dict=False,
        attention_instances=instances,
    )
    assert seen == [10, 11, 12]
    torch.testing.assert_close(own.lm_head(found), own(tokens).logits, rtol=1e-5, atol=1e-5)


def test_what_engines_read_of_the_classes(hf: Any) -> None:
    """No plan for a pipeline, which would drop the carry. That for tensor parallel is transformers'
    alone (``test_hf_parallel.py``)."""
    assert files.CLASSES["AutoModel"] == hf.CRNetModel.__name__
    assert hf.CRNetConfig.base_model_pp_plan is None
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"crnet": f"{hf.__name__}:{hf.register.__name__}"}
    hf.register()
    hf.register()
