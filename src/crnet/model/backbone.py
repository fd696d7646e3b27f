"""Blocks, the carry between them, the head and the loss.

    x -> embed -> [ x + attention(norm x) -> x + feedforward(norm x) ] * L -> norm -> head -> loss

Between blocks travel the residual stream x and, where the parameterization asks for it, the outputs
of the seven linear maps. Parameters carry Hugging Face's LLaMA names, so that a full-rank state
dict is one of ``LlamaForCausalLM``.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crnet import linears, optimizers
from crnet.config.sections import ModelConfig
from crnet.kernels.elementwise import rms_norm
from crnet.kernels.loss import IGNORED, linear_cross_entropy
from crnet.model.attention import Attention, LayerCache, Maps, Mix, Rope, rope
from crnet.model.feedforward import FeedForward
from crnet.recompute import engine as recompute


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain, initially 1."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def reset_parameters(self, generator: torch.Generator) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, slots: Sequence[linears.Slot]):
        super().__init__()
        method = linears.get(config.linear)
        options = getattr(config, config.linear, None)
        self.slots = tuple(slots)
        maps = {slot.position: method.make(slot, options, config.init_std) for slot in slots}
        kv_heads = config.num_kv_heads or config.num_heads
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(maps, config.num_heads, kv_heads)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(maps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        *carry: Tensor,
        cache: LayerCache | None = None,
        recompute: recompute.Step | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the new residual stream and the outputs of the seven maps.

        Args:
            x_BTD: residual stream.
            rope: tables for these tokens.
            carry: nothing, or the seven outputs of an earlier block in the order of ``POSITIONS``.
            cache: this block's keys and values when decoding.
            recompute: runs this block, keeping less for the backward pass.
        Source: arXiv:2509.18993, eq. 1, 2 and 6, with LLaMA's norms and residuals.
        """
        if recompute is not None:
            return recompute(self, x_BTD, rope, carry)
        x_BTD, outputs = self.compute(x_BTD, rope, _Direct(self, carry), cache)
        return self.leave(x_BTD, outputs), *outputs

    def compute(
        self, x_BTD: Tensor, rope: Rope, maps: Maps, cache: LayerCache | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Everything but the last sum: the stream after attention, and the seven outputs."""
        q, k, v, o = self.self_attn(self.input_layernorm(x_BTD), rope, maps, cache)
        x_BTD = _add(x_BTD, o)
        return x_BTD, (q, k, v, o, *self.mlp(self.post_attention_layernorm(x_BTD), maps))

    def leave(self, x_BTD: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The last sum: the stream that leaves the block."""
        return _add(x_BTD, outputs[linears.POSITIONS.index("down")])

    def above(self, x_BTD: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The stream that leaves the block, from the one that enters it and the seven outputs."""
        return self.leave(_add(x_BTD, outputs[linears.POSITIONS.index("o")]), outputs)

    def linear(self, position: str) -> nn.Module:
        """The module of a position."""
        part = self.self_attn if position in ("q", "k", "v", "o") else self.mlp
        return getattr(part, f"{position}_proj")


class _Direct:
    """Every map by its own forward."""

    def __init__(self, block: Block, carry: Sequence[Tensor]):
        self.block = block
        self.below = dict(zip(linears.POSITIONS, carry, strict=True)) if carry else {}

    def __call__(self, position: str, x_BTD: Tensor) -> Tensor:
        return self.block.linear(position)(x_BTD, self.below.get(position))

    def attend(self, mix: Mix, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
        return mix(q_BNTH, k_BKSH, v_BKSH)


def _add(x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
    # The stream keeps its dtype, whatever that of the outputs; the sum widens narrower ones.
    wider = y_BTD.dtype.itemsize > x_BTD.dtype.itemsize
    return x_BTD + (y_BTD.to(x_BTD.dtype) if wider else y_BTD)


class Backbone(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size, "the vocabulary size is resolved before a model is built"
        self.config = config
        self.carry = linears.get(config.linear).carry
        self.recomputation: recompute.Recomputation | None = None
        """What the blocks keep for the backward pass; None: everything."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        slots = linears.slots(config)
        width = len(linears.POSITIONS)
        self.layers = nn.ModuleList(
            Block(config, slots[start : start + width]) for start in range(0, len(slots), width)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, tokens_BT: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Return the normed output of the last block, (B, T, D)."""
        config = self.config
        x_BTD = self.embed_tokens(tokens_BT)
        start = cache[0].length if cache else 0
        head_size = config.hidden_size // config.num_heads
        tables = rope(start, tokens_BT.shape[1], head_size, config.rope_theta, x_BTD.device)
        steps = None
        if self.recomputation and cache is None and torch.is_grad_enabled():
            steps = self.recomputation.steps(self.blocks(), self.carry)
        carry: tuple[Tensor, ...] = ()
        for idx, block in enumerate(self.layers):
            x_BTD, *outputs = block(
                x_BTD,
                tables,
                *carry,
                cache=cache[idx] if cache else None,
                recompute=steps[idx] if steps else None,
            )
            carry = recompute.next_carry(self.carry, idx, carry, tuple(outputs))
            del outputs
        return self.norm(x_BTD)

    def blocks(self) -> list[Block]:
        """The blocks, bottom first."""
        found = [block for block in self.layers if isinstance(block, Block)]
        assert len(found) == len(self.layers), "a wrapped block would be passed over"
        return found


class LanguageModel(nn.Module):
    """A causal language model. ``model(tokens, targets)`` returns the loss."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size or 0, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed next-token loss and how many tokens it is over.

        Args:
            tokens_BT: int64 inputs.
            targets_BT: int64, the token that follows each input; -100 where none counts.
        Returns:
            (0-d loss in nats, fp32 or better; 0-d int64 count). Sums, not means: they add up over
            micro-batches and ranks whatever the padding.
        """
        x_BTD = self.model(tokens_BT)
        loss_sum = linear_cross_entropy(
            x_BTD.reshape(-1, x_BTD.shape[-1]), self.lm_head.weight, targets_BT.reshape(-1)
        )
        return loss_sum, (targets_BT != IGNORED).sum()

    def logits(
        self,
        tokens_BT: Tensor,
        cache: Sequence[LayerCache] | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Return logits (B, T, V), or (B, 1, V) of the last token where ``last_only``.

        With ``cache``, the tokens continue what is in it.
        """
        x_BTD = self.model(tokens_BT, cache)
        return self.lm_head(x_BTD[:, -1:] if last_only else x_BTD)

    def new_cache(self, capacity: int) -> list[LayerCache]:
        """Empty key/value caches for ``capacity`` tokens, one a block."""
        return [LayerCache(capacity) for _ in self.model.layers]

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill every parameter from a seed; the same numbers on any device.

        Embedding and head come first, so that models of one shape and seed share them whatever
        their parameterization.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_std
        on_cpu = {name: torch.empty(p.shape) for name, p in self.named_parameters()}
        filled = set()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in on_cpu:
                on_cpu[name].normal_(0, std, generator=generator)
                filled.add(name)
        for prefix, module in self.named_modules():
            own = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
            own &= on_cpu.keys()  # a tied head is listed once, as the embedding
            if not own - filled:
                continue
            _reset_on_cpu(module, prefix, on_cpu, generator)
            filled |= own
        assert filled == set(on_cpu), f"never initialised: {sorted(set(on_cpu) - filled)}"
        for name, parameter in self.named_parameters():
            parameter.copy_(on_cpu[name])

    def optimizer_groups(self) -> list[optimizers.Group]:
        """Every trained parameter in exactly one group, by learning-rate factor and decay."""
        method = linears.get(self.config.linear)
        options = getattr(self.config, self.config.linear, None)
        treatment: dict[str, linears.Group] = {}
        for idx, block in enumerate(self.model.blocks()):
            for slot in block.slots:
                part = "self_attn" if slot.position in ("q", "k", "v", "o") else "mlp"
                for name, group in method.groups(slot, options).items():
                    full = f"model.layers.{idx}.{part}.{slot.position}_proj.{name}"
                    treatment[full] = group
        members: dict[linears.Group, dict[str, Tensor]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                default = linears.Group(decays=parameter.dim() >= 2)
                members.setdefault(treatment.pop(name, default), {})[name] = parameter
            else:
                treatment.pop(name, None)
        assert not treatment, f"groups name parameters that do not exist: {sorted(treatment)}"
        return [
            optimizers.Group(tuple(named), tuple(named.values()), group.lr_factor, group.decays)
            for group, named in members.items()
        ]


def _reset_on_cpu(
    module: nn.Module, prefix: str, on_cpu: dict[str, Tensor], generator: torch.Generator
) -> None:
    # The module fills its parameters while they stand on the CPU in fp32, wherever they live.
    own = dict(module.named_parameters(recurse=False))
    kept = {name: parameter.data for name, parameter in own.items()}
    for name, parameter in own.items():
        parameter.data = on_cpu[f"{prefix}.{name}"]
    module.reset_parameters(generator)  # type: ignore[operator]
    for name, parameter in own.items():
        parameter.data = kept[name]


def build(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> LanguageModel:
    """Build an initialised model.

    It is laid out without memory first, so that a parameter nobody initialises is an error and
    never whatever the memory held. Cost: one fp32 copy of the weights on the CPU meanwhile.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.reset_parameters(seed)
    return model
