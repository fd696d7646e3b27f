"""A checkpoint's folder is one that transformers opens: model, tokenizer, defaults, card."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from crnet.config.sections import DataConfig, ModelConfig, RunConfig, TrainConfig
from crnet.data import tokenizer as tokenizers
from crnet.errors import ConfigError
from crnet.hub import files
from crnet.inference.generate import complete
from crnet.inference.load import load_model, load_tokenizer
from crnet.inference.sampling import Sampling
from crnet.storage import checkpoint, parts
from crnet.storage.checkpoint import Checkpoint, Progress
from crnet.train import run as training

pytestmark = pytest.mark.slow

SHARED = Path(os.environ.get("CRNET_SHARED") or Path(__file__).parents[2] / "shared")
PROMPT = "import argparse\n"
TEXTS = ("Hello world, this is  a test.\n\nNew line\tand tab", " lead and trail ", "Ünï 漢 🙂", "")


@pytest.fixture(scope="module")
def config(corpus: Path) -> RunConfig:
    """The vocabulary of the model has more rows than the tokenizer has entries."""
    return RunConfig(
        model=ModelConfig(
            hidden_size=32,
            intermediate_size=48,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            rank="8",
            vocab_size=333,
        ),
        data=DataConfig(
            source=(str(corpus),),
            documents="paragraph",
            vocab_size=320,
            sequence_length=32,
            validation_tokens=512,
        ),
        train=TrainConfig(steps=20, batch_size=8, save_every_steps=10),
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "run"
    training.run(config, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def saved(run: Path) -> Checkpoint:
    found = checkpoint.newest(run)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        import crnet.hf  # noqa: F401

        return transformers


@pytest.fixture(scope="module")
def opened(saved: Checkpoint, transformers: Any) -> tuple[Any, Any]:
    """Model and tokenizer of the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(saved.folder)
    for parameter in model.parameters():  # a mapped file's odd addresses change sums
        parameter.data = parameter.data.clone()
    return model, transformers.AutoTokenizer.from_pretrained(saved.folder)


@torch.no_grad()
def test_the_folder_opens(saved: Checkpoint, opened: tuple[Any, Any]) -> None:
    """Logits bit for bit, the same ids, and the ids that end and fill."""
    model, tokenizer = opened
    own, named = load_model(saved), load_tokenizer(saved)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert ids[0].tolist() == named.encode(PROMPT)
    assert torch.equal(model(ids).logits, own.logits(ids))
    assert model.config.eos_token_id == tokenizer.eos_token_id == named.eos_id
    assert model.generation_config.eos_token_id == named.eos_id
    assert model.config.spec.tensors == own.spec.tensors
    assert model.config.max_position_embeddings == saved.config.data.sequence_length


def test_texts_are_those_of_the_package(
    saved: Checkpoint, opened: tuple[Any, Any], transformers: Any
) -> None:
    """Greedy, by generate, by a pipeline, and piece by piece."""
    model, tokenizer = opened
    sampling = Sampling(greedy=True, max_tokens=30)
    wanted = "".join(complete(load_model(saved), load_tokenizer(saved), PROMPT, sampling))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    words: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    (found,) = pipe(PROMPT, **words)
    assert found["generated_text"] == PROMPT + wanted
    pieces: list[str] = []
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    model.generate(**tokenizer(PROMPT, return_tensors="pt"), streamer=streamer, **words)
    assert "".join(pieces) == wanted
    assert len(pieces) > 1


def test_rows_that_are_no_entries_are_never_written(saved: Checkpoint, opened: Any) -> None:
    model, tokenizer = opened
    assert model.config.vocab_size > len(tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    words = {"max_new_tokens": 400, "temperature": 50.0, "eos_token_id": None}
    found = model.generate(**ids, do_sample=True, **words)
    assert int(found.max()) < len(tokenizer)


def test_without_importing_the_package(saved: Checkpoint, tmp_path: Path) -> None:
    """``trust_remote_code=True`` and two lines beside the weights find the package's own class."""
    program = (
        "import sys, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], "
        "trust_remote_code=True)\n"
        "base = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__module__, type(base).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved.folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.split() == ["crnet.hf.modeling", "CRNetModel"], done.stderr


def test_the_card_says_what_happened(run: Path, saved: Checkpoint) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val_perplexity" in row][-1]
    text = (saved.folder / files.CARD).read_text(encoding="utf-8")
    assert f"{last['val_perplexity']:.4f} over {last['val_tokens']:,} tokens" in text
    assert f"{last['val_bits_per_byte']:.4f} over {last['val_bytes']:,} bytes" in text
    assert f"{saved.progress.tokens:,} tokens, 20 of 20 steps" in text
    parameters = sum(each.numel() for each in saved.weights().values())
    assert f"| parameters | {parameters:,}," in text
    assert "license:" in text


def test_what_may_be_edited_is_in_no_checksum(config: RunConfig, run: Path, tmp_path: Path) -> None:
    """A licence in the card, other defaults, a folder without any of it: crnet goes on."""
    copy = shutil.copytree(run, tmp_path / "run")
    newest, before = checkpoint.found(copy)
    (newest / files.CARD).write_text("license: mine\n")
    (newest / files.GENERATION).unlink()
    for name in files.NAMES:  # of a version that wrote none
        (before / name).unlink()
    for folder in (newest, before):
        load_model(checkpoint.load(folder))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=21))
    result = training.run(longer, copy, resume=True, progress=False)
    assert result.checkpoint is not None
    assert "21 of 21" in (result.checkpoint / files.CARD).read_text()


def test_parts_are_to_be_made_whole_first(
    saved: Checkpoint, transformers: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved.folder, tmp_path / "parts")
    weights = checkpoint.load(folder).weights()
    (folder / checkpoint.WEIGHTS).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        parts.write(folder, {f"{checkpoint.IN_WEIGHTS}{name}": it for name, it in weights.items()})
    with pytest.raises(ConfigError, match="crnet consolidate"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["t5-tokenizer.json", "t5-base.spiece.model", "axlearn_bpe_32k_c4.model"]
)
def test_tokenizers_of_others(
    name: str, config: RunConfig, transformers: Any, tmp_path: Path
) -> None:
    """The ids of a text are the package's; T5's tokenizer.json adds an end token where asked."""
    path = SHARED / "data" / "tokenizers" / name
    if not path.is_file():
        pytest.skip(f"no {path}; set CRNET_SHARED to the shared folder")
    own = tokenizers.load(str(path))
    model = dataclasses.replace(config.model, vocab_size=own.vocab_size)
    own.save(tmp_path)
    files.write(own, tmp_path, dataclasses.replace(config, model=model), Progress(1, 1, 1), None)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (found.eos_token_id, found.pad_token_id) == (own.eos_id, own.pad_id)
    for text in TEXTS:
        wanted = own.encode(text)
        ends = [own.eos_id] if name.endswith(".json") else []
        assert found(text).input_ids == wanted + ends, text
        assert found(text, add_special_tokens=False).input_ids == wanted, text
