"""What architectures with rotary attention and grouped heads declare alike. No torch.

``q``, ``k`` and ``v`` may be of any head size; with ``qk_norm`` every head of queries and keys is
normed over its own width before it is rotated (Qwen-3), one gain for all heads of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crnet.architectures import Architecture, Batch, _passes, split_side
from crnet.specs import Position, Shape, TensorSpec, constant, normal

NORM = "attention norm"
"""Of the input of q, k and v."""


@dataclass(frozen=True)
class RotaryWork:
    """What attention does with one micro-batch, as ``specs.BlockWork`` has it."""

    flops: int
    """Forward; backward twice that."""
    kept_outputs: tuple[str, ...]
    kept_bytes: int
    kept_items: tuple[int, ...]
    attention_bytes: int
    moved_bytes: int
    mixed_bytes: int
    """Of what the map ``o`` reads."""
    mask_bytes: int
    passes: list[_passes.Both]


def head_problems(shape: Shape) -> list[str]:
    """What rotary embedding cannot turn."""
    if shape.head_size % 2 == 0:
        return []
    return [
        f"--model.head-size, else --model.hidden-size {shape.hidden_size} over --model.num-heads "
        f"{shape.num_heads}, gives heads of odd size {shape.head_size}; rotary embedding needs an "
        f"even one: take --model.head-size {shape.head_size + 1}"
    ]


def positions(shape: Shape, shared: bool = True) -> tuple[Position, ...]:
    """q, k, v and o. ``shared``: whether processes can share them, each with some of the heads."""
    h, width, kv = shape.hidden_size, shape.attention_size, shape.kv_size
    rows = (
        ("q", "self_attn.q_proj", h, width, NORM),
        ("k", "self_attn.k_proj", h, kv, NORM),
        ("v", "self_attn.v_proj", h, kv, NORM),
        ("o", "self_attn.o_proj", width, h, "mixed"),
    )
    heads = dict.fromkeys("qkv", shape.head_size)
    return tuple(
        Position(
            *row,
            split=split_side(row[-1]) if shared else None,
            head_size=heads.get(row[0], 0),
        )
        for row in rows
    )


def tensors(shape: Shape, *, qk_norm: bool) -> dict[str, TensorSpec]:
    """Embedding and norms, by full name."""
    norm, head_norm = _norm(shape.hidden_size), _norm(shape.head_size)
    size = (shape.vocab_size, shape.hidden_size)
    found = {"model.embed_tokens.weight": TensorSpec(size, "embedding", normal(shape.init_std))}
    for idx in range(shape.num_layers):
        found[f"model.layers.{idx}.input_layernorm.weight"] = norm
        if qk_norm:
            found |= dict.fromkeys(head_norms(idx), head_norm)
        found[f"model.layers.{idx}.post_attention_layernorm.weight"] = norm
    return found | {"model.norm.weight": norm}


def head_norms(layer_idx: int) -> tuple[str, ...]:
    """Full names of the gains of a block's queries and keys."""
    return tuple(f"model.layers.{layer_idx}.self_attn.{name}_norm.weight" for name in "qk")


def _norm(size: int) -> TensorSpec:
    return TensorSpec((size,), "norm", constant(1.0), decays=False)


def work(shape: Shape, batch: Batch, *, qk_norm: bool, window: int | None) -> RotaryWork:
    """Of the norm before the maps, the rotation and the mixing."""
    rows, e = batch.rows, batch.compute_bytes
    width, kv = shape.attention_size, shape.kv_size
    heads = (shape.num_heads, shape.num_kv_heads)
    sums, mixed = rows * shape.num_heads * 4, rows * width * e
    statistics = rows * 4 * (1 + (sum(heads) if qk_norm else 0))
    passes = [_passes.rms_norm(rows, shape.hidden_size, batch.stream_bytes, e)]
    passes += [_passes.rotation(rows, each, e) for each in (width, kv)]
    if qk_norm:
        passes += [_passes.rms_norm(rows * each, shape.head_size, e, e) for each in heads]
    masks = window is not None and window < batch.length
    return RotaryWork(
        flops=4 * rows * batch.length * width,
        kept_outputs=("q", "k", "v") if qk_norm else ("v",),
        kept_bytes=statistics + rows * (width + kv) * e + sums,
        kept_items=(rows * width, rows * kv),
        attention_bytes=mixed + sums,
        moved_bytes=2 * rows * (width + kv) * e,
        mixed_bytes=mixed,
        mask_bytes=e * batch.length**2 if masks else 0,
        passes=passes,
    )


class RotaryArchitecture(Architecture):
    """Tables of cosines and sines, an embedding, a last RMSNorm."""

    def rotated_size(self, shape: Shape, options: Any) -> int:
        """Items of a head that are rotated."""
        return shape.head_size

    def table_bytes(self, shape, options, batch):
        half = self.rotated_size(shape, options) // 2
        if batch.compute_bytes == 4:  # looked at where they are cached, for a power of 2 of tokens
            return 2 * 4 * half * (1 << max(batch.length - 1, 1).bit_length())
        return 2 * batch.compute_bytes * half * batch.length * shape.num_layers

    def last_norm_passes(self, shape, batch):
        size = shape.hidden_size
        return _passes.rms_norm(batch.rows, size, batch.stream_bytes, batch.compute_bytes)

    def make_outside(self, shape, options):
        from torch import nn

        from crnet.layers.norms import RMSNorm

        return {
            "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
            "norm": RMSNorm(shape.hidden_size, shape.norm_eps),
        }

    def context(self, shape, options, start, length, device, caches):
        from crnet.layers.attention import Context, rope

        size = self.rotated_size(shape, options)
        tables = rope(start, length, size, shape.rope_theta, device)
        return Context(tables, tuple(caches) if caches is not None else None)
