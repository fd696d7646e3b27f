"""Attention the way transformers asks for it: by a function, a mask and a cache of its choice.

The model's attention hands its queries, keys and values over (``layers.attention.Context.attend``)
and knows nothing of what happens to them. An engine that brings a function of its own (vLLM,
SGLang, flash attention) gets the module, which says of which layer it is, and the keywords that the
model was called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from crnet.errors import ConfigError
from crnet.layers.attention import Attend, Attention


def prepare(module: nn.Module, config: Any) -> None:
    """Give every attention of a model what attention functions read of it."""
    for each in module.modules():
        if isinstance(each, Attention):
            told: Any = each
            told.config, told.is_causal = config, True
            told.scaling = each.head_size**-0.5
            told.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads


def attend_by(
    config: Any,
    mask: Any,
    cache: Cache | None,
    keywords: Mapping[str, Any],
    weights: list[Tensor] | None,
) -> Attend:
    """What stands in for the model's own cache and attention (``Context.attend``).

    Raises, when called:
        ConfigError: an engine's own attention expects another number of heads, or other widths.
    Args:
        config: says which function (``_attn_implementation``).
        mask: what transformers made for that function; None: causal.
        cache: takes the new keys and values in, and gives those of all tokens.
        keywords: handed to the function.
        weights: each layer's are appended, where the function gives any.
    """
    instances = keywords.get("attention_instances") or {}
    window = {"sliding_window": config.sliding_window} if config.sliding_window else {}
    function = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager_attention_forward
    )

    def attend(module: Any, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
        _refuse_other_heads(instances.get(module.layer_idx), q_BNTH)
        k_BKSH, v_BKSH = k_BKTH, v_BKTH
        if cache is not None:
            k_BKSH, v_BKSH = cache.update(k_BKTH, v_BKTH, module.layer_idx)
        mixed_BTNH, shares = function(
            module,
            q_BNTH,
            k_BKSH,
            v_BKSH,
            mask,
            dropout=0.0,
            scaling=module.scaling,
            **window,
            **keywords,
        )
        if weights is not None and shares is not None:
            weights.append(shares)
        batch, num_heads, num_new, head_size = q_BNTH.shape
        return mixed_BTNH.view(batch, num_new, num_heads, head_size).transpose(1, 2)

    return attend


def _refuse_other_heads(instance: Any, q_BNTH: Tensor) -> None:
    """``instance``: an engine's attention of one layer, which may say how many heads it has and how
    wide they are."""
    _, num_heads, _, head_size = q_BNTH.shape
    width = getattr(instance, "head_size", head_size)
    if width != head_size:
        raise ConfigError(
            f"the engine's attention has heads of {width}, the model's queries and keys are "
            f"{head_size} wide; run it with transformers' own generate"
        )
    expected = getattr(instance, "num_heads", num_heads)
    if expected != num_heads:
        raise ConfigError(
            f"the engine's attention has {expected} heads, the model's maps give {num_heads}: an "
            "engine splits nn.Linear alone, and a map is none; run it with a tensor-parallel size "
            "of 1"
        )
