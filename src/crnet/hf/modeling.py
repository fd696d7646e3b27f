"""The model as transformers calls one.

    CRNetForCausalLM            model, lm_head: the names of ``crnet.model.language_model``
      CRNetModel                embed_tokens, layers, norm, ...: the backbone's own modules

Between blocks travels what always does; only K and V are cached, since a carry reaches from block
to block of the same token.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from crnet.config.check import policy_problem
from crnet.config.model_spec import ModelSpec
from crnet.errors import ConfigError
from crnet.hf import parts as parallel
from crnet.hf.attention import attend_by, prepare
from crnet.hf.configuration import CRNetConfig
from crnet.hub.names import fp32_names
from crnet.kernels.loss import IGNORED
from crnet.layers.attention import Attend
from crnet.layers.block import Block, run_blocks
from crnet.layers.compiled_blocks import forward
from crnet.layers.experts import Uneven
from crnet.model.build import initial_value
from crnet.model.language_model import blocks_of, make_parts
from crnet.recompute.engine import Recomputation
from crnet.recompute.plan import RecomputePlan
from crnet.storage import parts
from crnet.storage.checkpoint import WEIGHTS

PREFIX = "model"
"""Of the backbone in the language model."""


class CRNetPreTrainedModel(PreTrainedModel):
    """What both models say of themselves."""

    config: CRNetConfig
    config_class = CRNetConfig
    base_model_prefix = PREFIX
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and what a method does not train is frozen.

        Raises:
            ConfigError: the folder is a checkpoint in parts, or ``tp_size`` does not divide heads.
        """
        folder = Path(pretrained_model_name_or_path or ".")
        if os.path.isfile(folder / parts.INDEX) and not os.path.isfile(folder / WEIGHTS):
            raise ConfigError(
                f"{folder}: its weights are in parts, written by several processes; write them as "
                f"one file first: crnet consolidate {folder} --out FOLDER"
            )
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        (found[0] if isinstance(found, tuple) else found)._freeze()
        return found

    def _freeze(self) -> None:
        """Tensors that a method holds fixed: transformers makes parameters anew as it loads."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                spec = self._spec.tensors.get(f"{self._names.get(id(module))}.{name}")
                if spec is not None and not spec.trained:
                    parameter.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill a module as training does: from (seed, full name); the seed is torch's."""
        declared, prefix = self._spec.tensors, self._names.get(id(module))
        names = {
            f"{prefix}.{name}": parameter
            for name, parameter in module.named_parameters(recurse=False)
            if prefix is not None
        }
        if not names.keys() <= declared.keys() or prefix is None:
            super()._init_weights(module)  # a head for another task
            return
        for name, parameter in names.items():
            if parameter.device.type != "meta" and not getattr(
                parameter, "_is_hf_initialized", False
            ):
                init.copy_(parameter, initial_value(self._spec, torch.initial_seed(), name))

    def _describe(self, spec: ModelSpec, prefix: str) -> None:
        """Keep the specification, and every module's full name in it."""
        self._spec = spec
        joined = (f"{prefix}.{{}}" if prefix else "{}").format
        self._names = {id(module): joined(name) for name, module in self.named_modules() if name}
        known = fp32_names(spec)
        self._keep_in_fp32_modules_strict = [
            name.removeprefix(f"{prefix}.") if prefix else name for name in known
        ]


class CRNetModel(CRNetPreTrainedModel):
    """Embedding, blocks and the last norm: tokens -> hidden states."""

    _keys_to_ignore_on_load_unexpected = ["lm_head.*"]
    embed_tokens: nn.Module
    layers: nn.ModuleList
    last_read: Any
    norm: Any

    def __init__(self, config: CRNetConfig):
        super().__init__(config)
        for name, module in make_parts(config.spec).items():
            self.add_module(name, module)
        self._describe(config.spec, PREFIX)
        for block, slots in zip(blocks_of(self.layers), self._spec.slots, strict=True):
            for slot in slots:  # adapters ask for them
                linear = block.maps[slot.position]
                linear.in_features, linear.out_features = slot.in_size, slot.out_size
        self.runner: Recomputation | None = None
        self.gradient_checkpointing = False
        parallel.prepare(blocks_of(self.layers), self._spec)
        prepare(self, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        uneven: Uneven | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As any decoder of transformers.

        Returns hidden states (B, T, D), normed; with ``output_hidden_states`` also what every block
        read, and the last as they are returned. ``uneven`` is told how uneven the
        experts of each block are.
        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds`` came.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            count = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (count + seen).unsqueeze(0)
        windowed = self.config.sliding_window is not None
        make_mask = create_sliding_window_causal_mask if windowed else create_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        weights: list[Tensor] | None = [] if output_attentions else None
        read: list[Tensor] | None = [] if output_hidden_states else None
        keywords = {**kwargs, "position_ids": position_ids, "use_cache": use_cache}
        attend = attend_by(self.config, mask, past_key_values, keywords, weights)
        context = self._context(inputs_embeds, position_ids, attend, uneven)
        x_BTD = self._through(
            inputs_embeds, position_ids, context, read, has_cache=past_key_values is not None
        )
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=None if read is None else (*read, x_BTD),
            attentions=None if weights is None else tuple(weights),
        )

    def _context(
        self, x_BTD: Tensor, positions: Tensor, attend: Attend, uneven: Uneven | None
    ) -> Any:
        spec = self._spec
        context = spec.architecture.context(
            *(spec.shape, spec.architecture_options),
            *(positions, x_BTD.shape[1], x_BTD.device, None),
        )
        return dataclasses.replace(context, attend=attend, uneven=uneven)

    def _through(
        self,
        x_BTD: Tensor,
        positions: Tensor,
        context: Any,
        read: list[Tensor] | None,
        *,
        has_cache: bool,
    ) -> Tensor:
        """The normed stream after the last block; ``read`` gets what every block read."""
        x_BTD = self._spec.architecture.place(self, x_BTD, positions)

        def run(block: Block, context: Any, tensors: Any) -> tuple[Tensor, ...]:
            if read is not None:
                read.append(block.around()[0].read(block.split(tensors)[0]))
            return forward(block, context, tensors)

        blocks = blocks_of(self.layers)
        plain = has_cache or read is not None or not torch.is_grad_enabled()
        if self.runner is None or plain or not self.training:
            state = run_blocks(blocks, (x_BTD,), context, run=run)
        else:
            state = self.runner(blocks, (x_BTD,), context)
        return self.norm(self.last_read.read(state))

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute by the package's own engine: the policy ``block``, or another that is asked for
        (``activation_checkpointing_kwargs={"policy": "replay"}``).

        Raises:
            ConfigError: ``use_reentrant``, ``offload``, ``every_n_layers``, or a policy that this
                model does not allow.
        """
        if not enable:
            self.runner, self.gradient_checkpointing = None, False
            return
        words = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        function = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func)
        policy = words.pop("policy", "block")
        problems = [
            f"activation checkpointing with {name}={value!r} is not what crnet's engine does; "
            "leave it out"
            for name, value in words.items()
            if (name, value) not in (("use_reentrant", False), ("preserve_rng_state", False))
        ]
        if every_n_layers != 1:
            problems.append(f"every_n_layers is {every_n_layers}; crnet's engine takes them all")
        if function is not checkpoint:
            problems.append("offload is not what crnet's engine does; leave it out")
        if problem := policy_problem(self._spec, policy):
            problems.append(problem)
        if problems:
            raise ConfigError(problems)
        self.runner = Recomputation(RecomputePlan(policy=policy))
        self.gradient_checkpointing = True


class CRNetForCausalLM(CRNetPreTrainedModel, GenerationMixin):
    """The model with its head: tokens -> logits, and the loss of labels."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CRNetConfig):
        super().__init__(config)
        self.model = CRNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size or 0, config.vocab_size or 0, bias=False)
        self._describe(config.spec, "")
        self.post_init()
        if self.model.tp_plan:
            self.tp_plan |= parallel.HEAD

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        self.model._set_gradient_checkpointing(enable, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal language model of transformers: ``labels`` are the inputs, -100 where a
        token does not count."""
        factor = self._spec.architecture.balance_factor(self._spec.architecture_options)
        asks = labels is not None and factor and torch.is_grad_enabled()
        uneven = Uneven() if asks else None
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            uneven=uneven,
            **kwargs,
        )
        x_BTD = slice_logits_to_keep(found.last_hidden_state, logits_to_keep)
        logits = self.lm_head(x_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if uneven is not None:
                count = kwargs.get("num_items_in_batch")
                count = (labels[:, 1:] != IGNORED).sum() if count is None else count
                loss = uneven.in_gradient(loss, factor / count)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )
