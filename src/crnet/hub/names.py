"""A model's configuration under the names that transformers and engines read. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from crnet.config.model_spec import ModelSpec, model_spec, shape_of
from crnet.config.sections import ModelConfig, field_name
from crnet.config.serialize import to_dict

MODEL_TYPE = "crnet"
"""Of a ``config.json``; also its key of the package's own configuration of the model."""

STANDARD = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
"""Engines' name -> the package's."""


def standard_names(config: ModelConfig, length: int) -> dict[str, Any]:
    """What engines read of a model whose vocabulary is known.

    Args:
        length: tokens of a row in training, for an architecture that sets no bound of its own.
    Returns: values for the keys of ``STANDARD`` (``head_dim`` as wide as engines' caches have
        to be), ``max_position_embeddings``,
        ``rope_parameters``; ``sliding_window`` where there is one.
    """
    spec = model_spec(config)
    shape = spec.shape
    longest = spec.architecture.max_length(spec.architecture_options)
    window = spec.architecture.window(spec.architecture_options)
    return {name: getattr(shape, own) for name, own in STANDARD.items()} | {
        "head_dim": spec.architecture.key_size(shape, spec.architecture_options),
        "max_position_embeddings": longest or length,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        **({} if window is None else {"sliding_window": window}),
    }


def own_names(config: ModelConfig) -> dict[str, Any]:
    """The configuration as plain values, every size worked out; of the methods that have options,
    those in use."""
    shape = shape_of(config)
    sizes = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    values = to_dict(dataclasses.replace(config, **sizes))
    used = {field_name(each) for each in (config.architecture, config.linear, config.stream)}
    return {
        key: value for key, value in values.items() if key in used or not isinstance(value, Mapping)
    }


def fp32_names(spec: ModelSpec) -> list[str]:
    """Full names of the tensors that are fp32 whatever the others are."""
    return [name for name, tensor in spec.tensors.items() if tensor.dtype == "float32"]
