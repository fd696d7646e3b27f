"""LLaMA: pre-norm blocks, rotary embedding, grouped key/value heads, a gated feed-forward.

Parameters carry Hugging Face's names, so that a full-rank state dict is one of
``LlamaForCausalLM``; with ``--model.llama.qk-norm true`` of ``Qwen3ForCausalLM``, with
``--model.llama.window`` of ``MistralForCausalLM``. ``--model.head-size`` is a head's width where it
is not hidden size over heads.

Source: Touvron et al. 2023 (arXiv:2302.13971); norms of queries and keys: Qwen3 technical report
(arXiv:2505.09388) and transformers' modeling_qwen3.py; the window: Mistral 7B (arXiv:2310.06825)
and transformers' masking_utils.py.
Deviation: the window is a mask over all pairs: it changes what is attended to and not what is
computed, and a cache keeps every token; a single new token reads the window alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.architectures import _passes, _rotary, split_side
from crnet.specs import BlockWork, Position, in_each_way


@dataclass(frozen=True, kw_only=True)
class LlamaOptions:
    """LLaMA."""

    qk_norm: bool = False
    """Norm every head of queries and keys before it is rotated (Qwen-3)."""
    window: int | None = None
    """Tokens that one attends to, itself among them (Mistral); none: all before it."""


class Llama(_rotary.RotaryArchitecture):
    name = "llama"
    summary = "RMSNorm, rotary embedding, gated feed-forward; seven positions"
    Options = LlamaOptions
    examples = (LlamaOptions(qk_norm=True, window=3),)
    pads = True
    input_modules = {
        "attention norm": "input_layernorm",
        "feed-forward norm": "post_attention_layernorm",
    }

    def problems(self, shape, options):
        found = _rotary.head_problems(shape)
        if options.window is not None and options.window < 1:
            found.append(
                f"--model.llama.window is {options.window}; take 1 or more, or leave it out"
            )
        return found

    def window(self, options):
        return options.window

    def packs(self, options):
        return not options.qk_norm and options.window is None

    def plain_form(self, shape, options):
        common = {"hidden_act": "silu", "attention_bias": False}
        if options.qk_norm:
            window = {"sliding_window": options.window, "max_window_layers": 0}
            return common | {
                "model_type": "qwen3",
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": options.window is not None,
                **(window if options.window else {}),
            }
        if options.window is not None:
            return common | {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "sliding_window": options.window,
            }
        return common | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "mlp_bias": False,
        }

    def positions(self, shape, options):
        h, f = shape.hidden_size, shape.intermediate_size
        rows = (
            ("gate", "mlp.gate_proj", h, f, "feed-forward norm"),
            ("up", "mlp.up_proj", h, f, "feed-forward norm"),
            ("down", "mlp.down_proj", f, h, "activated"),
        )
        feed_forward = tuple(Position(*row, split=split_side(row[-1])) for row in rows)
        return _rotary.positions(shape) + feed_forward

    def tensors(self, shape, options):
        return _rotary.tensors(shape, qk_norm=options.qk_norm)

    def summed(self, shape, options):
        if not options.qk_norm:
            return ()
        return tuple(name for idx in range(shape.num_layers) for name in _rotary.head_norms(idx))

    def work(self, shape, options, batch, keeps_activation):
        rows, e = batch.rows, batch.compute_bytes
        h, f = shape.hidden_size, shape.intermediate_size
        inside = _rotary.work(shape, batch, qk_norm=options.qk_norm, window=options.window)
        hidden, activated = rows * h * e, rows * f * e
        activation = _passes.swiglu if keeps_activation else _passes.product_of_two
        forward, backward = _passes.total(
            [
                *inside.passes,
                _passes.rms_norm(rows, h, batch.stream_bytes, e),
                activation(rows, f, e),
            ]
        )
        return BlockWork(
            forward_flops=inside.flops,
            backward_flops=2 * inside.flops,
            input_bytes={
                "attention norm": hidden,
                "mixed": inside.mixed_bytes,
                "feed-forward norm": hidden,
                "activated": activated,
            },
            kept_inputs=frozenset({"mixed"}),
            kept_outputs=(*inside.kept_outputs, "gate", "up"),
            kept_bytes=inside.kept_bytes + 4 * rows,
            kept_items=inside.kept_items,
            attention_bytes=inside.attention_bytes,
            attention_items=inside.mixed_bytes // e,
            activation_bytes=3 * activated,
            passes=forward + in_each_way(0, 2 if e < 4 else 0),  # casts of the tables
            backward_passes=backward,
            attention_moved_bytes=inside.moved_bytes,
            mask_bytes=inside.mask_bytes,
        )

    def make_block(self, shape, options, layer_idx, keeps_activation):
        from crnet.architectures.llama.module import LlamaBlock

        return LlamaBlock(shape, options, layer_idx, keeps_activation)


METHODS = [Llama()]
