"""The files that make a checkpoint's folder one that transformers opens.

    config.json             sizes under the names that engines read, and the package's own
    generation_config.json  where a text ends
    modeling_crnet.py       two lines, for who has the package and did not import it
    README.md               the model card (``hub.card``)

They follow from what the checkpoint holds, are written beside it, and are left out of its
checksums: a licence, or other defaults of generation, may be written into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crnet.config.sections import RunConfig
from crnet.data.chat import stop_ids
from crnet.data.tokenizer import Tokenizer
from crnet.hub.card import Evaluated, card
from crnet.hub.names import MODEL_TYPE, own_names, standard_names
from crnet.storage.checkpoint import Progress
from crnet.storage.files import write_json

CONFIG, GENERATION, SHIM, CARD = (
    "config.json",
    "generation_config.json",
    "modeling_crnet.py",
    "README.md",
)
NAMES = (CONFIG, GENERATION, SHIM, CARD)

CLASSES = {
    "AutoConfig": "CRNetConfig",
    "AutoModel": "CRNetModel",
    "AutoModelForCausalLM": "CRNetForCausalLM",
}
"""transformers' class that finds one -> the class of ``crnet.hf``."""

SHIM_TEXT = (
    '"""The model is in the package crnet; it has to be installed."""\n'
    f"from crnet.hf import {', '.join(CLASSES.values())}  # noqa: F401\n"
)


def model_config(config: RunConfig, eos_id: int, pad_id: int | None) -> dict[str, Any]:
    """What ``config.json`` says. ``config``: resolved."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [CLASSES["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{Path(SHIM).stem}.{own}" for auto, own in CLASSES.items()},
        "dtype": "bfloat16" if config.train.precision == "bf16" else "float32",
        **sizes(config, eos_id, pad_id),
        MODEL_TYPE: own_names(config.model),
    }


def sizes(config: RunConfig, eos_id: int, pad_id: int | None) -> dict[str, Any]:
    """What engines read of any model."""
    return standard_names(config.model, config.data.sequence_length) | {
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id if pad_id is None else pad_id,
    }


def write(
    tokenizer: Tokenizer,
    folder: Path,
    config: RunConfig,
    at: Progress,
    found: Evaluated | None,
) -> None:
    """Write all of them into an existing folder; of an adapter the card alone.

    Args:
        config: of the run, resolved.
        at: where it stands.
        found: its latest evaluation.
    Raises:
        OSError: they cannot be written.
    """
    if config.train.adapter is None:
        described = model_config(config, tokenizer.eos_id, tokenizer.pad_id)
        write_configs(folder, described, tokenizer)
        (folder / SHIM).write_text(SHIM_TEXT, encoding="utf-8")
    (folder / CARD).write_text(card(config, at, found), encoding="utf-8")


def write_configs(folder: Path, described: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Write ``config.json`` and the defaults of generation that follow from it."""
    write_json(folder / CONFIG, described)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: described[name] for name in special}
    if len(ends := stop_ids(tokenizer)) > 1:  # a turn's, too
        generation["eos_token_id"] = list(ends)
    if unwritten := list(range(tokenizer.vocab_size, described["vocab_size"])):
        generation["suppress_tokens"] = unwritten  # rows of the embedding that are no entries
    write_json(folder / GENERATION, generation)
