"""GPT-2: layer norms, learned positions, a bias at every map, gelu, a tied head.

Source: Radford et al. 2019 and the released code, openai/gpt-2 src/model.py. Deviation: the three
maps of q, k and v are three positions, so that each has its own rank; the released code holds them
in one matrix, which is the same function. All matrices and both embeddings start with
``--model.init-std``. The released code does so too with 0.02, but for the learned positions (0.01);
transformers also starts the maps ``o`` and ``down`` smaller by sqrt(2 L), which the paper speaks of
and the released code does not do.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.architectures import Architecture, _passes, split_side
from crnet.specs import BlockWork, Position, TensorSpec, constant, normal


@dataclass(frozen=True, kw_only=True)
class GPT2Options:
    """GPT-2."""

    max_length: int = 1024
    """Positions that are learned: most tokens of a row."""


class GPT2(Architecture):
    name = "gpt2"
    summary = "LayerNorm, learned positions, biases, gelu; six positions"
    Options = GPT2Options
    examples = (GPT2Options(max_length=16),)
    ties_embeddings = True
    pads = True
    input_modules = {
        "attention norm": "input_layernorm",
        "feed-forward norm": "post_attention_layernorm",
    }

    def problems(self, shape, options):
        found = []
        if shape.num_kv_heads != shape.num_heads:
            found.append(
                f"--model.num-kv-heads {shape.num_kv_heads} differs from --model.num-heads "
                f"{shape.num_heads}; gpt2 has no grouped heads: leave it out"
            )
        if shape.attention_size != shape.hidden_size:
            found.append(
                f"--model.head-size {shape.head_size}: heads of gpt2 are as wide together as the "
                "stream; leave it out"
            )
        if options.max_length < 1:
            found.append(f"--model.gpt2.max-length is {options.max_length}; take 1 or more")
        return found

    def max_length(self, options):
        return options.max_length

    def positions(self, shape, options):
        h, f = shape.hidden_size, shape.intermediate_size
        rows = (
            ("q", "self_attn.q_proj", h, h, "attention norm"),
            ("k", "self_attn.k_proj", h, h, "attention norm"),
            ("v", "self_attn.v_proj", h, h, "attention norm"),
            ("o", "self_attn.o_proj", h, h, "mixed"),
            ("up", "mlp.up_proj", h, f, "feed-forward norm"),
            ("down", "mlp.down_proj", f, h, "activated"),
        )
        heads = dict.fromkeys("qkv", shape.head_size)
        return tuple(
            Position(
                *row,
                has_bias=True,
                split=split_side(row[-1]),
                head_size=heads.get(row[0], 0),
            )
            for row in rows
        )

    def tensors(self, shape, options):
        h, std = shape.hidden_size, normal(shape.init_std)
        gain = TensorSpec((h,), "norm", constant(1.0), decays=False)
        shift = TensorSpec((h,), "bias", constant(0.0), decays=False)
        found = {
            "model.embed_tokens.weight": TensorSpec((shape.vocab_size, h), "embedding", std),
            "model.embed_positions.weight": TensorSpec((options.max_length, h), "embedding", std),
        }
        norms = [
            f"model.layers.{idx}.{name}"
            for idx in range(shape.num_layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        for name in (*norms, "model.norm"):
            found |= {f"{name}.weight": gain, f"{name}.bias": shift}
        return found

    def work(self, shape, options, batch, keeps_activation):
        rows, e = batch.rows, batch.compute_bytes
        products = 4 * rows * batch.length * shape.hidden_size
        hidden, activated = rows * shape.hidden_size * e, rows * shape.intermediate_size * e
        log_sum_exp = rows * shape.num_heads * 4
        # q, k, v and up plus their biases; without the activation the last is what down reads.
        h, f = shape.hidden_size, shape.intermediate_size
        sums = (*[rows * h] * 3, *[rows * f] * keeps_activation)
        parts = [_passes.layer_norm(rows, h, batch.stream_bytes, e)] * 2
        parts += [_passes.bias(rows, width, e) for width in (h, h, h, h, f, h)]
        parts += [_passes.gelu(rows, f, e)] * keeps_activation
        forward, backward = _passes.total(parts)
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
            kept_outputs=(),
            kept_bytes=2 * _statistics_bytes(batch) + e * sum(sums) + log_sum_exp,
            kept_items=sums,
            attention_bytes=hidden + log_sum_exp,
            attention_items=rows * h,
            activation_bytes=(2 if keeps_activation else 1) * activated,
            passes=forward,
            backward_passes=backward,
            attention_moved_bytes=4 * hidden,
        )

    def last_norm_bytes(self, batch):
        return _statistics_bytes(batch)

    def last_norm_passes(self, shape, batch):
        size = shape.hidden_size
        return _passes.layer_norm(batch.rows, size, batch.stream_bytes, batch.compute_bytes)

    def make_block(self, shape, options, layer_idx, keeps_activation):
        from crnet.architectures.gpt2.module import GPT2Block

        return GPT2Block(shape, layer_idx, keeps_activation)

    def make_outside(self, shape, options):
        from torch import nn

        from crnet.layers.norms import LayerNorm

        return {
            "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
            "embed_positions": nn.Embedding(options.max_length, shape.hidden_size),
            "norm": LayerNorm(shape.hidden_size, shape.norm_eps),
        }

    def place(self, outside, x_BTD, start):
        if not isinstance(start, int):
            return x_BTD + outside.embed_positions(start)
        positions, end = outside.embed_positions.weight, start + x_BTD.shape[1]
        if end > len(positions):
            raise ValueError(
                f"{end} tokens came, and --model.gpt2.max-length is {len(positions)}; "
                "give fewer, or train with more positions"
            )
        # A slice, no lookup: autograd keeps no index for it.
        return x_BTD + positions[start:end]

    def context(self, shape, options, start, length, device, caches):
        from crnet.layers.attention import Context

        return Context(None, tuple(caches) if caches is not None else None)


def _statistics_bytes(batch) -> int:
    """Mean and inverse deviation of every row, in the stream's dtype as torch has it on a CPU; on a
    GPU they are fp32, 4 bytes a row more in a bf16 run."""
    return 2 * batch.rows * batch.stream_bytes


METHODS = [GPT2()]
