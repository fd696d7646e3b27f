"""LLaMA: pre-norm blocks, rotary embedding, grouped key/value heads, a gated feed-forward.

Parameters carry Hugging Face's names, so that a full-rank state dict is one of
``LlamaForCausalLM``.
"""

from __future__ import annotations

from crnet.architectures import Architecture, _passes, split_side
from crnet.specs import BlockWork, Position, TensorSpec, constant, in_each_way, normal


class Llama(Architecture):
    name = "llama"
    summary = "RMSNorm, rotary embedding, gated feed-forward; seven positions"
    pads = True
    input_modules = {
        "attention norm": "input_layernorm",
        "feed-forward norm": "post_attention_layernorm",
    }

    def problems(self, shape, options):
        if shape.head_size % 2:
            return [
                f"--model.hidden-size {shape.hidden_size} over --model.num-heads "
                f"{shape.num_heads} gives heads of odd size {shape.head_size}; "
                "rotary embedding needs an even one"
            ]
        return []

    def positions(self, shape, options):
        h, f, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_size
        rows = (
            ("q", "self_attn.q_proj", h, h, "attention norm"),
            ("k", "self_attn.k_proj", h, kv, "attention norm"),
            ("v", "self_attn.v_proj", h, kv, "attention norm"),
            ("o", "self_attn.o_proj", h, h, "mixed"),
            ("gate", "mlp.gate_proj", h, f, "feed-forward norm"),
            ("up", "mlp.up_proj", h, f, "feed-forward norm"),
            ("down", "mlp.down_proj", f, h, "activated"),
        )
        return tuple(Position(*row, split=split_side(row[-1])) for row in rows)

    def tensors(self, shape, options):
        norm = TensorSpec((shape.hidden_size,), "norm", constant(1.0), decays=False)
        size = (shape.vocab_size, shape.hidden_size)
        found = {"model.embed_tokens.weight": TensorSpec(size, "embedding", normal(shape.init_std))}
        for idx in range(shape.num_layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{idx}.{name}.weight"] = norm
        return found | {"model.norm.weight": norm}

    def work(self, shape, options, batch, keeps_activation):
        rows, e = batch.rows, batch.compute_bytes
        h, f, kv = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_size
        products = 4 * rows * batch.length * h
        hidden, statistics, sums = rows * h * e, 2 * rows * 4, rows * shape.num_heads * 4
        activated = rows * f * e
        activation = _passes.swiglu if keeps_activation else _passes.product_of_two
        forward, backward = _passes.total(
            [
                *[_passes.rms_norm(rows, h, batch.stream_bytes, e)] * 2,
                *(_passes.rotation(rows, width, e) for width in (h, kv)),
                activation(rows, f, e),
            ]
        )
        return BlockWork(
            forward_flops=products,
            backward_flops=2 * products,
            input_bytes={
                "attention norm": hidden,
                "mixed": hidden,
                "feed-forward norm": hidden,
                "activated": activated,
            },
            kept_inputs=frozenset({"mixed"}),
            kept_outputs=("v", "gate", "up"),
            kept_bytes=statistics + rows * (h + kv) * e + sums,
            attention_bytes=hidden + sums,
            activation_bytes=3 * activated,
            passes=forward + in_each_way(0, 2 if e < 4 else 0),  # casts of the tables
            backward_passes=backward,
            attention_moved_bytes=2 * rows * (h + kv) * e,
        )

    def table_bytes(self, shape, options, batch):
        half = shape.head_size // 2
        if batch.compute_bytes == 4:  # looked at where they are cached, for a power of 2 of tokens
            return 2 * 4 * half * (1 << max(batch.length - 1, 1).bit_length())
        return 2 * batch.compute_bytes * half * batch.length * shape.num_layers

    def last_norm_passes(self, shape, batch):
        size = shape.hidden_size
        return _passes.rms_norm(batch.rows, size, batch.stream_bytes, batch.compute_bytes)

    def make_block(self, shape, options, layer_idx, keeps_activation):
        from crnet.architectures.llama.module import LlamaBlock

        return LlamaBlock(shape, layer_idx, keeps_activation)

    def make_outside(self, shape, options):
        from torch import nn

        from crnet.layers.norms import RMSNorm

        return {
            "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
            "norm": RMSNorm(shape.hidden_size, shape.norm_eps),
        }

    def context(self, shape, options, start, length, device, caches):
        from crnet.layers.attention import Context, rope

        tables = rope(start, length, shape.head_size, shape.rope_theta, device)
        return Context(tables, tuple(caches) if caches is not None else None)


METHODS = [Llama()]
