"""The model card of a checkpoint: what it is, what it read, what it reached, what it cost."""

from __future__ import annotations

import dataclasses

import crnet
from crnet.config.model_spec import model_spec
from crnet.config.sections import RunConfig, adapter_of
from crnet.cost.flops import block_flops
from crnet.cost.workload import micro_batch_of
from crnet.hub.names import MODEL_TYPE
from crnet.inference.evaluate import Evaluation
from crnet.recompute.plan import RecomputePlan
from crnet.storage.checkpoint import Progress

Evaluated = tuple[int, Evaluation]
"""The step of an evaluation, and what it found."""


def card(
    config: RunConfig, at: Progress, found: Evaluated | None, *, is_plain: bool = False
) -> str:
    """Text of the card.

    Args:
        config: of the run, resolved.
        at: where it stands.
        found: the latest evaluation; None: there was none.
        is_plain: whether transformers' own class opens the folder.
    """
    model, data, adapter = config.model, config.data, adapter_of(config.train)
    usage = PLAIN_USAGE if is_plain else OWN_USAGE if adapter is None else ADAPTER_USAGE
    spec = dataclasses.replace(model_spec(model), adapter=adapter)
    parameters = sum(tensor.num_items for tensor in spec.tensors.values())
    trained = sum(tensor.num_items for tensor in spec.tensors.values() if tensor.trained)
    rows = {
        "model": f"{model.linear}, {model.stream} stream, {model.architecture}",
        "shape": f"{model.num_layers} blocks, width {model.hidden_size}, feed-forward "
        f"{model.intermediate_size}, {spec.shape.num_heads} heads, {spec.shape.num_kv_heads} of "
        f"keys and values, vocabulary {spec.shape.vocab_size}",
        "parameters": f"{parameters:,}, of which {trained:,} are trained",
        "data": ", ".join(data.source) + (f", {data.subset}" if data.subset else ""),
        "tokenizer": data.tokenizer,
        "rows": f"{data.rows}, {data.sequence_length} tokens"
        + (f" of conversations, of which {data.chat_loss} count" if data.chat else ""),
        "trained on": f"{at.tokens:,} tokens, {at.step:,} of {config.train.steps:,} steps, "
        f"seed {config.train.seed}",
        "optimizer": f"{config.optimizer.name}, rate {config.optimizer.lr:g}, "
        f"{config.optimizer.schedule}",
        "precision": config.train.precision,
        "perplexity": _reached(found),
        **_measured(found),
        "cost": f"{_token_flops(config):.4g} FLOPs a token forward and backward (products; "
        "recomputation not counted)"
        # Of a model that was another one in earlier steps, which a checkpoint does not tell.
        + (f", {_token_flops(config) * at.tokens:.4g} in all" if spec.is_fixed else ""),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: {"transformers" if adapter is None else "peft"}
pipeline_tag: text-generation
tags: [{MODEL_TYPE}]
---

# {config.preset}, {model.linear}

<!-- license: add a line `license: ...` to the header above before you hand this model on. -->

| | |
|---|---|
{table}

Written by crnet {crnet.__version__}. {usage}
"""


OWN_USAGE = """With `pip install 'crnet[hf]'`:

```python
import crnet.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

`trust_remote_code=True` stands in for the first line; the package is needed all the same. Where the
weights are in parts (`*.distcp`), `crnet consolidate` writes them as one file first. `crnet export`
writes a folder without the state of the optimizer."""

ADAPTER_USAGE = """An adapter; the weights under it are in another checkpoint
(`adapter_config.json` names it). With `pip install 'crnet[hf]'`:

```python
import crnet.hf
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("the checkpoint under it")
model = PeftModel.from_pretrained(crnet.hf.adaptable(base), "this folder")
```"""

PLAIN_USAGE = """Every map is merged into a matrix: transformers' own class opens this
folder, `AutoModelForCausalLM.from_pretrained("this folder")`."""


def _reached(found: Evaluated | None) -> str:
    if found is None:
        return "not evaluated yet"
    step, reached = found
    return f"{reached.perplexity:.4f} over {reached.tokens:,} tokens held out, at step {step:,}"


def _measured(found: Evaluated | None) -> dict[str, str]:
    """What an evaluation of a version that counted bytes has besides."""
    if found is None or not found[1].bytes:
        return {}
    reached = found[1]
    return {
        "bits per byte": f"{reached.bits_per_byte:.4f} over {reached.bytes:,} bytes of that text",
        "accuracy": f"{reached.accuracy:.2%} of the next tokens",
    }


def _token_flops(config: RunConfig) -> float:
    """Forward and backward, the head's too."""
    spec = model_spec(config.model)
    micro_batch = micro_batch_of(config, spec)
    flops = block_flops(micro_batch, RecomputePlan())
    head = 6 * spec.shape.hidden_size * spec.shape.vocab_size
    return (flops["forward"] + flops["backward"]) / micro_batch.rows + head
