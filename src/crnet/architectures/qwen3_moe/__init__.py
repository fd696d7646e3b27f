"""Qwen-3 MoE: attention with normed heads, and a layer of experts in the feed-forward's place.

``y = sum_k w_k down_k(silu(gate_k x) * up_k x)`` over the ``num_active`` experts of the largest
``softmax(R x)``; ``w`` are their shares, made to add up to 1 with ``normalises``. No dense
feed-forward. The router R is fp32 in every precision. ``--model.intermediate-size`` is the width of
one expert.

Every map of an expert is a position (``gate.3``), so that a parameterization holds for them as for
any map; ranks are given by kind (``--model.rank 224/gate=192``). What the layer of experts gives
is a position too, ``experts``: a map without a matrix, where CR-Net adds its carry. An expert's own
maps carry nothing, for the rows that it got one block below were other tokens'.

Training adds ``balance_factor`` times how uneven the experts are to the gradient, the mean over
layers; the loss that is told stays the cross-entropy.

Source: Qwen3 technical report (arXiv:2505.09388) and transformers' modeling_qwen3_moe.py; the
paper's table 7 and E.3.
Deviation: transformers adds up how uneven experts are over all layers before it multiplies, and
over a whole micro-batch; here it is row by row (DeepSeek-V3, arXiv:2412.19437, eq. 17), so that no
step hangs on the size of a micro-batch or the number of processes. Padding counts as tokens.
Unverified: the paper prints neither its balance loss nor its factor, nor whether the first
block's experts are full rank; here they are, as every first block's maps.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.architectures import _passes, _rotary
from crnet.specs import (
    BlockWork,
    Expert,
    Passes,
    Position,
    TensorSpec,
    Traffic,
    in_each_way,
    normal,
)


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeOptions:
    """Qwen-3 MoE."""

    num_experts: int = 4
    """Experts of a block (table 7: 24; the released 30B-A3B: 128)."""
    num_active: int = 2
    """Experts that a token goes through (table 7: 4; the released one: 8)."""
    normalises: bool = True
    """Make a token's weights add up to 1, as the released models do (norm_topk_prob)."""
    balance_factor: float = 1e-3
    """Share of how uneven the experts are in the gradient (transformers' router_aux_loss_coef);
    0: none."""


class Qwen3Moe(_rotary.RotaryArchitecture):
    name = "qwen3-moe"
    summary = "LLaMA's with normed heads and a layer of routed experts; positions of every expert"
    Options = Qwen3MoeOptions
    examples = (Qwen3MoeOptions(num_experts=5, num_active=3, normalises=False, balance_factor=0.0),)
    writes = ("o", "experts")
    compiles = False
    input_modules = {"attention norm": "input_layernorm"}

    def problems(self, shape, options):
        found = _rotary.head_problems(shape)
        if options.num_experts < 1:
            found.append(f"--model.qwen3-moe.num-experts is {options.num_experts}; take 1 or more")
        elif not 1 <= options.num_active <= options.num_experts:
            found.append(
                f"--model.qwen3-moe.num-active is {options.num_active}; take 1 to "
                f"{options.num_experts}, the number of experts"
            )
        if options.balance_factor < 0:
            found.append(
                f"--model.qwen3-moe.balance-factor is {options.balance_factor}; take 0 or more"
            )
        return found

    def balance_factor(self, options):
        return options.balance_factor

    def packs(self, options):
        return False

    def plain_form(self, shape, options):
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": False,
            "moe_intermediate_size": shape.intermediate_size,
            "num_experts": options.num_experts,
            "num_experts_per_tok": options.num_active,
            "norm_topk_prob": options.normalises,
            "router_aux_loss_coef": options.balance_factor,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }

    def positions(self, shape, options):
        h, f = shape.hidden_size, shape.intermediate_size
        found = [*_rotary.positions(shape, shared=False)]
        for idx in range(options.num_experts):
            expert = Expert(idx, options.num_experts, options.num_active)
            rows = (("gate", h, f, "dealt"), ("up", h, f, "dealt"), ("down", f, h, "activated"))
            found += [
                Position(
                    *(f"{kind}.{idx}", f"mlp.experts.{idx}.{kind}_proj"),
                    *(in_size, out_size, source),
                    expert=expert,
                )
                for kind, in_size, out_size, source in rows
            ]
        return (*found, Position("experts", "mlp.output", h, h, "combined", is_operator=True))

    def tensors(self, shape, options):
        found = _rotary.tensors(shape, qk_norm=True)
        size = (options.num_experts, shape.hidden_size)
        router = TensorSpec(size, "router", normal(shape.init_std), dtype="float32")
        last = found.popitem()
        for idx in range(shape.num_layers):
            found[f"model.layers.{idx}.mlp.gate.weight"] = router
        return found | dict([last])

    def work(self, shape, options, batch, keeps_activation):
        rows, e = batch.rows, batch.compute_bytes
        h, f = shape.hidden_size, shape.intermediate_size
        experts, active = options.num_experts, options.num_active
        inside = _rotary.work(shape, batch, qk_norm=True, window=None)
        hidden, dealt, activated = rows * h * e, active * rows * h * e, active * rows * f * e
        routing = 2 * rows * h * experts
        activation = _passes.swiglu if keeps_activation else _passes.product_of_two
        forward, backward = _passes.total(
            [
                *inside.passes,
                _passes.rms_norm(rows, h, batch.stream_bytes, e),
                *[activation(active * rows // experts, f, e)] * experts,
                _dealing(rows, active, h, e),
            ]
        )
        named = [f"{kind}.{idx}" for idx in range(experts) for kind in ("gate", "up")]
        return BlockWork(
            forward_flops=inside.flops + routing,
            backward_flops=2 * (inside.flops + routing),
            routing_flops=routing,
            input_bytes={
                "attention norm": hidden,
                "mixed": inside.mixed_bytes,
                "feed-forward norm": hidden,  # which the router reads
                "dealt": dealt,
                "activated": activated,
                "combined": hidden,
            },
            kept_inputs=frozenset({"mixed", "feed-forward norm"}),
            kept_outputs=(*inside.kept_outputs, *named),
            # The norm's statistics; shares; the choice, its weights, both orders; experts' outputs.
            kept_bytes=inside.kept_bytes + rows * (4 + 4 * experts + (8 + 4 + 16) * active) + dealt,
            kept_items=(*inside.kept_items, dealt // e),
            attention_bytes=inside.attention_bytes,
            attention_items=inside.mixed_bytes // e,
            activation_bytes=3 * activated // experts,
            passes=forward + in_each_way(0, 2 if e < 4 else 0),  # casts of the tables
            backward_passes=backward,
            attention_moved_bytes=inside.moved_bytes,
        )

    def make_block(self, shape, options, layer_idx, keeps_activation):
        from crnet.architectures.qwen3_moe.module import Qwen3MoeBlock

        return Qwen3MoeBlock(shape, options, layer_idx, keeps_activation)


def _dealing(rows: int, active: int, width: int, e: int) -> _passes.Both:
    """Rows taken, put together and given back: lookups, weights, sums, and the same backward. Of
    the router's own numbers, some a token, the kernels alone; below fp32 its input is cast."""
    size, token = active * rows * width * e, rows * width * e
    cast = (4 + e) * rows * width * (e < 4)
    # Taken, put together; taken back, weighted, summed.
    ahead = Traffic((2 + 2) * size + (2 + 2 + 1) * size + token + cast, 5 + _ROUTER_KERNELS)
    # Taken and weighted for the weights, and for what experts gave; put together, taken, summed.
    back = Traffic((2 + 2 + 1 + 1 + 2) * size + (2 + 2 + 1) * size + 3 * token + 2 * cast, 8)
    back += Traffic(0, _ROUTER_KERNELS)
    return Passes(ahead, ahead, ahead), Passes(back, back, back)


_ROUTER_KERNELS = 18
"""Each way, on a few numbers a token: softmax, choice, counts, sorting."""


METHODS = [Qwen3Moe()]
