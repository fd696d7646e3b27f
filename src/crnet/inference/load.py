"""A checkpoint on the disk becomes a model and a tokenizer.

    checkpoint (verified once, by storage) -> configuration -> ModelSpec
      -> names, shapes and dtypes compared, every difference in one error -> weights copied in

Nothing is initialised: the model is laid out without memory, gets memory, and is filled. The
checkpoint of an adapter names another one, which has the weights (``base_of``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from crnet.adapters import beside
from crnet.config.adapter import Adapter
from crnet.config.model_spec import ModelSpec, model_spec
from crnet.config.sections import adapter_of
from crnet.data import tokenizer
from crnet.errors import ConfigError
from crnet.linears._maps import dtype_of
from crnet.model.build import copy_into, lay_out, to_memory
from crnet.model.language_model import LanguageModel
from crnet.model.padding import stored_on
from crnet.model.tensor_parallel import stored
from crnet.storage import checkpoint, parts
from crnet.storage.checkpoint import CHECKSUMS, IN_WEIGHTS, WEIGHTS, Checkpoint
from crnet.storage.files import sha256


def load_model(
    saved: Checkpoint,
    device: torch.device | str = "cpu",
    spec: ModelSpec | None = None,
    lay: Callable[[ModelSpec], LanguageModel] = lay_out,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The model with its weights.

    Args:
        spec: of the checkpoint's model, as it is to be stored; None: as the device likes it.
        lay: lays it out without memory, perhaps split over processes.
        dtype: of the weights; None: that they were trained in.
    Raises:
        ConfigError: the weights are not those of the model that the configuration describes; or, of
            an adapter, ``base_of``.
    Cost: the weights once from the disk; one copy on the CPU beside the model's own memory.
    """
    if (adapter := adapter_of(saved.config.train)) is not None:
        return _with_adapter(saved, adapter, device, spec, lay, dtype)
    config = saved.config.model
    if not config.vocab_size:
        raise ConfigError(f"{saved.folder}: altered (model.vocab_size is {config.vocab_size!r})")
    try:
        spec = spec or stored_on(model_spec(config), device)
    except (ValueError, ArithmeticError) as error:
        raise ConfigError(f"{saved.folder}: its model cannot be built ({error})") from error
    trained = weights_dtype(saved.config.train.precision)
    dtype = dtype or trained
    if saved.in_parts:
        check_weights(spec, _declared_weights(saved), trained, saved.folder / parts.INDEX)
        weights = None  # read into the model's own memory, where its tensors are as they were saved
    else:
        weights = saved.weights()
        check_weights(spec, weights, trained, saved.folder / WEIGHTS)
    model = lay(spec)
    to_memory(model, device, dtype)
    as_saved = dtype == trained and spec.width_multiple == model.spec.num_parts == 1
    if weights is None and as_saved:
        own = {f"{IN_WEIGHTS}{name}": each.detach() for name, each in model.named_parameters()}
        parts.read_into(saved.folder, own)
    else:
        copy_weights(model, saved.weights() if weights is None else weights)
    return model


def _with_adapter(
    saved: Checkpoint,
    adapter: Adapter,
    device: torch.device | str,
    spec: ModelSpec | None,
    lay: Callable[[ModelSpec], LanguageModel],
    dtype: torch.dtype | None,
) -> LanguageModel:
    """``load_model`` of an adapter's checkpoint: the weights of its base, the adapter beside."""
    base, dtype = base_of(saved), dtype or weights_dtype(saved.config.train.precision)
    plain = dataclasses.replace(spec or model_spec(base.config.model), adapter=None)
    model = load_model(base, device, plain, lay, dtype)
    beside.put_beside(model, adapter, saved.config.train.seed)
    beside.read(saved.folder, model)
    return model


BASE, BASE_SHA256 = "base", "base_sha256"
"""What an adapter's checkpoint notes of the one with the weights: its folder, and the hash of its
checksums."""


def describe_base(folder: Path) -> dict[str, str]:
    """What an adapter's checkpoint notes of the one that has the weights."""
    return {BASE: os.path.abspath(folder), BASE_SHA256: sha256(folder / CHECKSUMS)}


def base_of(saved: Checkpoint) -> Checkpoint:
    """The checkpoint with the weights that an adapter was trained on, verified.

    Raises:
        ConfigError: it is not where it was, is damaged, or is another one.
    """
    folder = Path(saved.extra.get(BASE, ""))
    try:
        base = checkpoint.load(folder, with_state=False)
    except ConfigError as error:
        raise ConfigError(
            [
                f"{saved.folder}: is an adapter, and the weights under it are in {folder}; bring "
                "that back to where it was",
                *error.problems,
            ]
        ) from error
    if sha256(folder / CHECKSUMS) != saved.extra.get(BASE_SHA256):
        raise ConfigError(
            f"{saved.folder}: is an adapter, and {folder} is not the checkpoint that it was "
            "trained on (its checksums are others); bring that one back"
        )
    return base


def _declared_weights(saved: Checkpoint) -> dict[str, Tensor]:
    """Names, shapes and dtypes of weights that were written in parts, without memory."""
    return {
        name.removeprefix(IN_WEIGHTS): torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in parts.declared(saved.folder).items()
        if name.startswith(IN_WEIGHTS)
    }


def load_tokenizer(saved: Checkpoint) -> tokenizer.Tokenizer:
    """The tokenizer the run was trained with."""
    return tokenizer.load_saved(saved.folder)


def check_tokenizer(saved: Checkpoint, found: str) -> None:
    """Raise ``ConfigError`` where ids are not those that the model knows; ``found``: the hash of
    the tokenizer that made them."""
    if found != saved.extra.get("tokenizer"):
        raise ConfigError(
            f"{saved.folder}: was trained with another tokenizer than this corpus is prepared "
            f"with; give --data.tokenizer {saved.folder}"
        )


def weights_dtype(precision: str) -> torch.dtype:
    """Dtype of a run's weights, wherever a tensor does not declare another."""
    return torch.bfloat16 if precision == "bf16" else torch.get_default_dtype()


def check_weights(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: torch.dtype, path: Path
) -> None:
    """Compare weights with what a model declares.

    Args:
        dtype: of the run's weights (``weights_dtype``).
        path: where they come from, for the error.
    Raises:
        ConfigError: one problem for each name that is missing or unknown, and for each tensor of
            another shape or dtype.
    """
    problems = []
    for name, tensor in spec.tensors.items():
        if name not in weights:
            problems.append(f"{name} is missing")
            continue
        found = weights[name]
        wanted = dtype_of(tensor, dtype)
        if tuple(found.shape) != tensor.shape:
            problems.append(f"{name} has shape {tuple(found.shape)}, not {tensor.shape}")
        if found.dtype != wanted:
            problems.append(f"{name} has dtype {found.dtype}, not {wanted}")
    problems += [f"{name} is unknown" for name in weights if name not in spec.tensors]
    if problems:
        raise ConfigError(
            [f"{path}: these are not the weights of the model that was configured", *problems]
        )


@torch.no_grad()
def copy_weights(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Copy weights, already checked, into a model that has memory for them; of one whose blocks
    are spread over processes, into those that are here."""
    parameters = dict(model.named_parameters())
    for name in model.spec.tensors:
        copy_into(parameters[name], stored(weights[name], name, model.spec))


def pick_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one. Raises ``ConfigError`` where the device is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--train.device {name}: cannot be used ({reason}); say cpu, cuda or auto"
        ) from error
    return device
