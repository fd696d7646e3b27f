"""Does a pre-trained LLaMA show what section 3.1 of the paper saw? A real one, on real text.

    python runs/observation.py --weights FILE.bin --tokenizer FILE.model --text FILE --out F
    python runs/observation.py --quick --out F     # random weights of a tiny LLaMA, its own text

WEIGHTS: llama2.c's first layout: seven int32 (hidden size, intermediate size, blocks, heads,
key/value heads, vocabulary, longest row), then fp32. It becomes a transformers LLaMA, whose maps
``crnet.measure.observe`` compares with those of the block below. Prints the table for LOG.md.
Perplexity, of the first 65,536 tokens: that the weights were read right.

JSON: study, weights, perplexity, tokens, code, averages, maps.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from crnet.data import tokenizer
from crnet.measure.observe import as_rows, averages, observe, render
from crnet.storage.manifest import describe_code

MOST_TOKENS = 65_536


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--quick", action="store_true", help="random weights, this file's text")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if not given.quick and not (given.weights and given.tokenizer and given.text):
        parser.error("give --weights, --tokenizer and --text; or say --quick")
    return given


def pretrained(path: Path) -> LlamaForCausalLM:
    """The model of a llama2.c file."""
    header = np.fromfile(path, dtype="<i4", count=7).tolist()
    width, inner, num_blocks, heads, kv_heads, vocabulary, longest = header
    made = LlamaConfig(
        vocab_size=abs(vocabulary),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
    )
    model = LlamaForCausalLM(made)
    left = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=28))

    def take(*shape: int) -> Tensor:
        nonlocal left
        number = math.prod(shape)
        found, left = left[:number].view(shape), left[number:]
        return found

    kv_width = kv_heads * width // heads
    sizes = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "mlp.up_proj": (inner, width),
    }
    state = {"model.embed_tokens.weight": take(abs(vocabulary), width)}
    for name, shape in sizes.items():
        for block, weight in enumerate(take(num_blocks, *shape)):
            rotated = name.endswith(("q_proj", "k_proj"))
            state[f"model.layers.{block}.{name}.weight"] = (
                in_halves(weight, width // heads) if rotated else weight
            )
    state["model.norm.weight"] = take(width)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def in_halves(weight_FD: Tensor, head_size: int) -> Tensor:
    """Rows of a head in the order that transformers rotates: llama2.c turns neighbours, it turns
    the first half against the second."""
    rows = weight_FD.view(-1, head_size // 2, 2, weight_FD.shape[1])
    return rows.transpose(1, 2).reshape(weight_FD.shape)


def batches(ids: list[int], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a text, eight at a time."""
    number = min(len(ids) - 1, MOST_TOKENS) // length
    kept = torch.tensor(ids[: number * length + 1])
    rows, targets = (part.view(number, length) for part in (kept[:-1], kept[1:]))
    yield from zip(rows.split(8), targets.split(8), strict=True)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: list[tuple[Tensor, Tensor]]) -> float:
    total = count = 0
    for tokens, targets in rows:
        logits = model(input_ids=tokens).logits.flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
        total += float(losses.sum())
        count += targets.numel()
    return math.exp(total / count)


def main() -> None:
    given = arguments()
    if given.quick:
        torch.manual_seed(0)
        small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 256}
        small |= {"num_hidden_layers": 3, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**small)).eval()
        ids = list(Path(__file__).read_bytes()[:2000])
        given.length = 32
    else:
        model = pretrained(given.weights)
        ids = tokenizer.load(given.tokenizer).encode(given.text.read_text(encoding="utf-8"))
    rows = list(batches(ids, given.length))
    found = observe(model, rows)
    report = {
        "study": "observation",
        "weights": None if given.quick else given.weights.name,
        "perplexity": perplexity(model, rows),
        "tokens": sum(targets.numel() for _, targets in rows),
        "code": describe_code(),
        "averages": averages(found),
        "maps": as_rows(found),
    }
    print(f"perplexity {report['perplexity']:.2f} over {report['tokens']:,} tokens")
    print(render(report["averages"]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
