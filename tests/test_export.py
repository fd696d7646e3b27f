"""``crnet export``: a folder to hand on, and a plain LLaMA wherever a map is a matrix."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig, RunConfig
from crnet.data import tokenizer as tokenizers
from crnet.errors import ConfigError
from crnet.hub import export, files
from crnet.inference.load import load_tokenizer
from crnet.storage import checkpoint
from crnet.storage.checkpoint import Checkpoint, Contents, Progress
from shapes import error, make, one_of_every_method, random_tokens, randomised, tiny

VOCAB_SIZE = 300
MODELS = one_of_every_method(vocab_size=VOCAB_SIZE)
MERGES = (
    *("blast", "full", "lora", "loro", "lowrank", "relora", "rso", "shared", "sltrain", "sst"),
    *("self-guided", "switchlora", "velora"),
)
"""Parameterizations whose maps are matrices."""


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.train(["some words, again and again"] * 9, VOCAB_SIZE)


def saved_as(config: ModelConfig, tokenizer: tokenizers.Tokenizer, folder: Path) -> Checkpoint:
    """A checkpoint of a model none of whose tensors is at its first value."""
    weights = dict(randomised(make(config), torch.float32).named_parameters())
    run = RunConfig(model=config)
    contents = Contents(
        weights=weights,
        state={"optimizer": {}},
        config=dataclasses.replace(run, train=dataclasses.replace(run.train, precision="fp32")),
        progress=Progress(step=3, position=24, tokens=999),
        files={"tokenizer": tokenizer.save},
    )
    return checkpoint.load(checkpoint.save(folder, contents, keep=0))


def test_the_model_as_it_is(tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """Weights bit for bit, no optimizer's state; what was edited in the checkpoint is copied."""
    saved = saved_as(tiny(vocab_size=VOCAB_SIZE), tokenizer, tmp_path)
    export.export(saved, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*files.NAMES, checkpoint.WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    weights = (tmp_path / "out" / checkpoint.WEIGHTS).read_bytes()
    assert weights == (saved.folder / checkpoint.WEIGHTS).read_bytes()
    assert load_tokenizer(dataclasses.replace(saved, folder=tmp_path / "out")).hash
    (saved.folder / files.CARD).write_text("license: mine")
    export.export(saved, tmp_path / "edited")
    assert (tmp_path / "edited" / files.CARD).read_text() == "license: mine"
    with pytest.raises(ConfigError, match="not an empty folder"):
        export.export(saved, tmp_path / "out")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_matrix_is_refused(
    name: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    """Each with its reason, and nothing is written."""
    config = MODELS[name]
    spec = model_spec(config)
    form = spec.architecture.plain_form(spec.shape, spec.architecture_options)
    if config.linear in MERGES and form is not None and config.stream == "residual":
        pytest.skip("merges: below, and in tests of the architecture")
    saved = saved_as(config, tokenizer, tmp_path)
    with pytest.raises(ConfigError) as refused:
        export.export_plain(saved, tmp_path / "out")
    words = "; ".join(refused.value.problems)
    assert "take --to hf" in words
    assert not (tmp_path / "out").exists()
    reasons = {
        "no model with its tensors": config.architecture == "gpt2",
        "sublayers read more": config.stream != "residual",
        "its carry": config.linear in ("crnet", "resformer", "value-resformer", "lax"),
    }
    for reason, is_one in reasons.items():
        assert (reason in words) == is_one, (reason, words)


@pytest.mark.slow
@pytest.mark.parametrize("linear", MERGES)
@torch.no_grad()
def test_a_plain_llama(linear: str, tokenizer: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """transformers' own class gives the package's logits. Tolerance: the merged product is rounded,
    and attention of weights this large is sharp (seen: 1.0e-3, by processor)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    config = tiny(vocab_size=VOCAB_SIZE, linear=linear, rope_theta=500.0, norm_eps=1e-5)
    saved = saved_as(config, tokenizer, tmp_path)
    export.export_plain(saved, tmp_path / "out")
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(found) is transformers.LlamaForCausalLM
    tokens = random_tokens(2, 9)
    wanted = randomised(make(config), torch.float32).logits(tokens)
    assert error(found(tokens).logits, wanted) < (1e-6 if linear == "full" else 2e-3)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("some words").input_ids == tokenizer.encode("some words")
    assert found.generation_config.eos_token_id == tokenizer.eos_id
