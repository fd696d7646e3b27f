"""The configuration of a model, as transformers holds one."""

from __future__ import annotations

import dataclasses
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from crnet.config.check import check
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import DataConfig, ModelConfig, RunConfig
from crnet.config.serialize import build
from crnet.errors import ConfigError
from crnet.hf.parts import plan
from crnet.hub.names import MODEL_TYPE, STANDARD, own_names, standard_names

EXAMPLE_LENGTH = DataConfig().sequence_length
"""``max_position_embeddings`` of a model of which nobody said how long its rows were."""


@strict
class CRNetConfig(PreTrainedConfig):
    """What a model is.

    ``crnet`` is the package's own configuration (the section ``model`` of a run) and decides; the
    other fields are the same sizes under the names that engines read. Where only they are given,
    they say what ``crnet`` leaves open.

    >>> CRNetConfig(crnet={"linear": "crnet", "rank": "8"}, hidden_size=32, num_attention_heads=2)

    Raises:
        ConfigError: a size is said twice and differently, a key is unknown, or the model cannot be;
            every problem at once.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    crnet: dict | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    sliding_window: int | None = None
    rope_parameters: dict | None = None
    rms_norm_eps: float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        theta = kwargs.pop("rope_theta", None)
        model = self._described(theta)
        self.crnet = own_names(model)
        standard = standard_names(model, self.max_position_embeddings or EXAMPLE_LENGTH)
        for name, value in standard.items():
            setattr(self, name, value)
        vars(self)["base_model_tp_plan"] = plan(model_spec(model))  # which hangs on the method
        super().__post_init__(**kwargs)

    def _described(self, theta: float | None) -> ModelConfig:
        values, problems = dict(self.crnet or {}), []
        given = {name: getattr(self, name) for name in STANDARD}
        width = _key_size(values) if self.head_dim is not None else None
        given["rope_theta"] = (self.rope_parameters or {}).get("rope_theta", theta)
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind != "default":
            problems.append(f"rope_parameters has rope_type {kind!r}; crnet's models know default")
        for name, value in given.items():
            own = STANDARD.get(name, name)
            stated = values.get(own)
            if value is None or stated == value or (name == "head_dim" and value == width):
                continue
            if stated is not None and own != "vocab_size":  # what a resized embedding changes
                problems.append(f"{name} is {value}, but crnet[{own!r}] is {stated}; leave one out")
            values[own] = value
        values.setdefault("vocab_size", DataConfig().vocab_size)
        if problems:
            raise ConfigError(problems)
        model = build(ModelConfig, values, "crnet.")
        _check(model)
        return model

    @property
    def model_config(self) -> ModelConfig:
        """The package's configuration, with the vocabulary as it is now."""
        assert self.crnet is not None
        return build(ModelConfig, self.crnet | {"vocab_size": self.vocab_size})

    @property
    def spec(self) -> ModelSpec:
        """What follows from it. Cost: worked out at every call."""
        return model_spec(self.model_config)

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything: a default of another version must not change a model."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        found["crnet"] = own_names(self.model_config)
        return found


def _key_size(values: dict[str, Any]) -> int | None:
    """``head_dim`` of a model that the package's own configuration describes alone; None: it does
    not, or there is no such model."""
    if "head_size" not in values:
        return None
    try:
        known = {"vocab_size": DataConfig().vocab_size} | values
        spec = model_spec(build(ModelConfig, known, "crnet."))
    except ValueError:  # which is said later
        return None
    return spec.architecture.key_size(spec.shape, spec.architecture_options)


def _check(model: ModelConfig) -> None:
    """Raise ``ConfigError`` where there is no such model."""
    try:
        spec = model_spec(model)
    except ValueError as error:
        raise ConfigError(
            f"{error}; a method from outside the package is known once its file is loaded "
            "(crnet.registry.load_plugins), before crnet.hf is imported"
        ) from error
    longest = spec.architecture.max_length(spec.architecture_options)
    length = min(longest or EXAMPLE_LENGTH, EXAMPLE_LENGTH)
    data = dataclasses.replace(DataConfig(), sequence_length=length)
    check(RunConfig(model=model, data=data))
