"""Multi-head latent attention (MLA): DeepSeek's attention in a dense block of LLaMA's kind.

A token is kept for those after it as one latent and one rotary key for all heads:
`c, k_rope = kv_a(x)`; keys without a position and values of every head are `kv_b(norm(c))`. Queries
are `q_b(norm(q_a(x)))`, or `q(x)` where `q_lora_rank` is 0. Scores are scaled by
`(nope + rope)^-1/2`; a head's query and key end in the part that is rotated. RMSNorm, a gated
feed-forward and the stream are LLaMA's; there are no experts. A cache holds
`kv_lora_rank + qk_rope_head_dim` numbers a token and block, where LLaMA's holds keys and values
of every head.

**What CR-Net is here.** Every map is a position: q_a, q_b (or q), kv_a, kv_b, o, gate, up, down.
Each carries what the same map of the block below gave, before the norm and before the rotation, so
that what is carried is a map's output, as the paper has it. The norms behind q_a and kv_a take the
scale of a latent away: there the gain weighs what is carried against what is new, and nothing else.
The rotation is linear and the same in all blocks: carried and rotated, or rotated and carried, the
key is the same. Latent and rotary key are one map's output and have one gain.

That h -> latent is narrow already is no reason to leave q_a and kv_a out. The increment's rank is
below the latent's width, and it costs less than the dense map up to a rank of in out / (in + out).
That bound is low where one side is, so those positions want ranks of their own
(`--model.rank 192/kv_a=96/kv_b=96`); a rank above the latent's width is refused. The carry costs
what an output is wide: little at q_a and kv_a; at q_b and kv_b what it costs at LLaMA's q, k and v,
and the rotated part of the queries besides.

With a cache, keys and values of all tokens are made again by `kv_b` in every block, carry and all:
a block hands on what it made of every token, so that no carry is cached. The absorbed form, without
keys and values, is there under no parameterization: a carried `kv_b` is no matrix.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1, DeepSeek-V3 (arXiv:2412.19437) and
transformers' modeling_deepseek_v3.py; arXiv:2509.18993, section 6, names it as future work and says
nothing of positions: what CR-Net is here is ours.
Deviation: values narrower than keys are filled up with zeros for attention's kernel, which then
computes `2 (nope + rope)` a pair and head in the place of `nope + rope + v`. The rotation pairs
item i with i + rope / 2, as in LLaMA; released weights pair neighbours (transformers'
`rope_interleave`): the same function with rows of q_b and kv_a in another order. No YaRN.
Unverified: that latents of neighbouring blocks are as alike as the paper finds other outputs; ranks
and rates. No run of the paper has this attention.
Refused: `--parallel.tensor`, since latent and rotary key are whole on every process, and a map that
is not split has no place there; values wider than keys; grouped heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from crnet.architectures import _passes, _rotary
from crnet.specs import (
    BlockWork,
    Passes,
    Position,
    Shape,
    TensorSpec,
    Traffic,
    constant,
    in_each_way,
)


@dataclass(frozen=True, kw_only=True)
class MLAOptions:
    """Multi-head latent attention; the keys have the names that DeepSeek gave them."""

    q_lora_rank: int = 0
    """Width of the queries' latent (DeepSeek-V3: 1536); 0: queries are made of the input."""
    kv_lora_rank: int | None = None
    """Width of the latent of keys and values (DeepSeek-V3: 512); none: four heads' width."""
    qk_nope_head_dim: int | None = None
    """Items of a head's query and key that are not rotated (128), an even number; none:
    --model.head-size."""
    qk_rope_head_dim: int | None = None
    """Items of them that are (64), an even number; none: half of --model.head-size."""
    v_head_dim: int | None = None
    """Items of a head's values (128); none: --model.head-size."""


@dataclass(frozen=True)
class Sizes:
    """The options with every width worked out."""

    q_latent: int
    kv_latent: int
    nope: int
    rope: int
    value: int

    @property
    def head(self) -> int:
        """Of a query and a key."""
        return self.nope + self.rope


def sizes_of(shape: Shape, options: MLAOptions) -> Sizes:
    """Where an option is none, as DeepSeek-V3 has it of a head's width."""

    def given(value: int | None, otherwise: int) -> int:
        return otherwise if value is None else value

    return Sizes(
        q_latent=options.q_lora_rank,
        kv_latent=given(options.kv_lora_rank, 4 * shape.head_size),
        nope=given(options.qk_nope_head_dim, shape.head_size),
        rope=given(options.qk_rope_head_dim, max(2, shape.head_size // 4 * 2)),
        value=given(options.v_head_dim, shape.head_size),
    )


class MLA(_rotary.RotaryArchitecture):
    name = "mla"
    summary = "LLaMA's with DeepSeek's latent attention; seven or eight positions"
    Options = MLAOptions
    examples = (
        MLAOptions(q_lora_rank=8, kv_lora_rank=12, qk_rope_head_dim=4, v_head_dim=5),
        MLAOptions(q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6),
    )
    pads = True

    def problems(self, shape, options):
        found, sizes = [], sizes_of(shape, options)
        if shape.num_kv_heads != shape.num_heads:
            found.append(
                f"--model.num-kv-heads {shape.num_kv_heads} differs from --model.num-heads "
                f"{shape.num_heads}; keys and values of mla are made of one latent for every head: "
                "leave it out"
            )
        if sizes.q_latent < 0:
            found.append(
                f"--model.mla.q-lora-rank is {sizes.q_latent}; take 1 or more, or 0 for queries "
                "without a latent"
            )
        widths = {
            "kv-lora-rank": sizes.kv_latent,
            "qk-nope-head-dim": sizes.nope,
            "v-head-dim": sizes.value,
        }
        for flag, width in widths.items():
            if width < 1:
                found.append(f"--model.mla.{flag} is {width}; take 1 or more")
        if sizes.nope % 2:
            found.append(
                f"--model.mla.qk-nope-head-dim is {sizes.nope}; transformers wants queries of even "
                f"width: take {sizes.nope + 1}"
            )
        if sizes.rope < 2 or sizes.rope % 2:
            found.append(
                f"--model.mla.qk-rope-head-dim is {sizes.rope}; rotary embedding turns pairs: take "
                "an even number, 2 or more"
            )
        if sizes.value > sizes.head:
            found.append(
                f"--model.mla.v-head-dim {sizes.value} is above the {sizes.head} of a query "
                "(--model.mla.qk-nope-head-dim and --model.mla.qk-rope-head-dim together); take "
                f"{sizes.head} or less"
            )
        return found

    def rotated_size(self, shape, options):
        return sizes_of(shape, options).rope

    def key_size(self, shape, options):
        return sizes_of(shape, options).head

    def cache_items(self, shape, options):
        """Latent and rotary key."""
        sizes = sizes_of(shape, options)
        return sizes.kv_latent + sizes.rope

    def plain_form(self, shape, options):
        sizes = sizes_of(shape, options)
        return {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": False,
            "head_dim": sizes.rope,  # the width that transformers rotates
            "q_lora_rank": sizes.q_latent or None,
            "kv_lora_rank": sizes.kv_latent,
            "qk_nope_head_dim": sizes.nope,
            "qk_rope_head_dim": sizes.rope,
            "v_head_dim": sizes.value,
            "rope_interleave": False,
            "first_k_dense_replace": shape.num_layers,  # no block has experts
            "num_nextn_predict_layers": 0,
        }

    def positions(self, shape, options):
        h, f, sizes = shape.hidden_size, shape.intermediate_size, sizes_of(shape, options)
        queries, values = shape.num_heads * sizes.head, shape.num_heads * sizes.value
        c_q, c_kv = sizes.q_latent, sizes.kv_latent
        keys = shape.num_heads * sizes.nope + values
        rows = [("q", "self_attn.q_proj", h, queries, "attention norm")]
        if c_q:
            rows = [
                ("q_a", "self_attn.q_a_proj", h, c_q, "attention norm"),
                ("q_b", "self_attn.q_b_proj", c_q, queries, "query latent"),
            ]
        rows += [
            ("kv_a", "self_attn.kv_a_proj_with_mqa", h, c_kv + sizes.rope, "attention norm"),
            ("kv_b", "self_attn.kv_b_proj", c_kv, keys, "latent"),
            ("o", "self_attn.o_proj", values, h, "mixed"),
            ("gate", "mlp.gate_proj", h, f, "feed-forward norm"),
            ("up", "mlp.up_proj", h, f, "feed-forward norm"),
            ("down", "mlp.down_proj", f, h, "activated"),
        ]
        heads = {"q": sizes.head, "q_b": sizes.head, "kv_b": sizes.nope + sizes.value}
        return tuple(Position(*row, head_size=heads.get(row[0], 0)) for row in rows)

    def tensors(self, shape, options):
        sizes, found = sizes_of(shape, options), _rotary.tensors(shape, qk_norm=False)
        last = found.popitem()
        for idx in range(shape.num_layers):
            for name, size in (("q_a", sizes.q_latent), ("kv_a", sizes.kv_latent)):
                if size:
                    gain = TensorSpec((size,), "norm", constant(1.0), decays=False)
                    found[f"model.layers.{idx}.self_attn.{name}_layernorm.weight"] = gain
        return found | dict([last])

    def work(self, shape, options, batch, keeps_activation):
        sizes, rows, e = sizes_of(shape, options), batch.rows, batch.compute_bytes
        h, f, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads
        products = 4 * rows * batch.length * heads * sizes.head
        hidden, activated, latents = rows * h * e, rows * f * e, [sizes.kv_latent]
        latents += [sizes.q_latent] if sizes.q_latent else []
        wide, mixed = rows * heads * sizes.head * e, rows * heads * sizes.value * e
        sums, is_filled = rows * heads * 4, sizes.value < sizes.head
        activation = _passes.swiglu if keeps_activation else _passes.product_of_two
        forward, backward = _passes.total(
            [
                *[_passes.rms_norm(rows, h, batch.stream_bytes, e)] * 2,
                *[_passes.rms_norm(rows, width, e, e) for width in latents],
                *[_passes.rotation(rows, width * sizes.rope, e) for width in (heads, 1)],
                _joining(sizes, rows * e, heads),
                activation(rows, f, e),
            ]
        )
        return BlockWork(
            forward_flops=products,
            backward_flops=2 * products,
            input_bytes={
                "attention norm": hidden,
                "query latent": rows * sizes.q_latent * e,
                "latent": rows * sizes.kv_latent * e,
                "mixed": mixed,
                "feed-forward norm": hidden,
                "activated": activated,
            },
            # What is cut from what attention gives is another tensor.
            kept_inputs=frozenset() if is_filled else frozenset({"mixed"}),
            kept_outputs=(*(["q_a"] if sizes.q_latent else []), "kv_a", "gate", "up"),
            # Statistics of the norms; queries, keys and values; attention's sums and output.
            kept_bytes=4 * rows * (2 + len(latents)) + 3 * wide + sums + is_filled * wide,
            kept_items=(wide // e,) * 3,
            attention_bytes=wide + sums,
            attention_items=0 if is_filled else wide // e,
            activation_bytes=3 * activated,
            passes=forward + in_each_way(0, 2 if e < 4 else 0),  # casts of the tables
            backward_passes=backward,
            attention_moved_bytes=4 * wide,
        )

    def make_block(self, shape, options, layer_idx, keeps_activation):
        from crnet.architectures.mla.module import MLABlock

        return MLABlock(shape, sizes_of(shape, options), layer_idx, keeps_activation)


def _joining(sizes: Sizes, item: int, heads: int) -> _passes.Both:
    """Parts of queries and keys put side by side, values filled up, the result cut. Backward the
    parts' gradients side by side; of the rotary key the sum over heads. ``item``: bytes of an item
    a head and token."""
    wide, value, nope = (heads * item * each for each in (sizes.head, sizes.value, sizes.nope))
    rotary, latent = item * sizes.rope, item * (sizes.kv_latent + sizes.rope)
    ahead = Traffic(2 * wide + (nope + rotary + wide) + (value + wide), 3)
    back = Traffic(2 * wide + 2 * (nope + value) + 2 * latent + (wide + value), 4)
    back += Traffic((heads + 1) * rotary, 1)
    if sizes.value < sizes.head:
        ahead += Traffic(2 * value, 1)
        back += Traffic(value + wide, 1)
    return Passes(ahead, ahead, ahead), Passes(back, back, back)


METHODS = [MLA()]
