"""The adapter of a run (``config.adapter``): put beside a model, written and read as PEFT's own.

A checkpoint holds ``adapter_model.safetensors`` and ``adapter_config.json`` in the place of the
weights, which stay where they are: in the checkpoint that the run began with. PEFT makes the layers
and draws their values; the package trains, writes and reads their tensors by its own list
(``ModelSpec.tensors``).

Refused: ``get_peft_model``, whose model would stand around ours and hide what training asks of it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from crnet.adapters.maps import adaptable
from crnet.config.adapter import NAME, Adapter
from crnet.config.model_spec import ModelSpec
from crnet.errors import ConfigError
from crnet.model.language_model import LanguageModel
from crnet.model.seeds import generator_of
from crnet.storage.checkpoint import ADAPTER

PREFIX = "base_model.model."
"""What PEFT's names in a file begin with."""


def check_installed(adapter: Adapter | None) -> None:
    """Raise ``ConfigError`` where an adapter is wanted and PEFT is missing. It is not imported."""
    if adapter is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("--train.adapter needs the package peft; pip install 'crnet[hf]'")


def put_beside(model: LanguageModel, adapter: Adapter, seed: int) -> None:
    """Freeze a model and put an adapter beside every map of its blocks, in place.

    Args:
        model: with its weights, and whole.
        seed: of the values that the adapter begins with; its update is 0 then.
    Raises:
        ConfigError: PEFT is missing, or takes the maps for no linear layers.
    Cost: the adapter's tensors, fp32.
    """
    for block, slots in zip(model.model.blocks(), model.spec.slots, strict=True):
        for slot in slots:
            linear: Any = block.maps[slot.position]
            linear.in_features, linear.out_features = slot.in_size, slot.out_size
    peft, options = _peft(), _options(model.spec, adapter)
    state = torch.get_rng_state()
    try:  # PEFT draws from torch's own generator of the CPU
        torch.default_generator.manual_seed(generator_of(seed, "adapter").initial_seed())
        peft.inject_adapter_in_model(options, adaptable(model), NAME)
    except ValueError as error:
        raise ConfigError(f"--train.adapter: PEFT refuses this model ({error})") from error
    finally:
        torch.set_rng_state(state)
    model.spec = model.model.spec = dataclasses.replace(model.spec, adapter=adapter)
    for _, parameter in model.trained().values():
        parameter.data = parameter.data.float()


def _peft() -> Any:
    check_installed(Adapter(1, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        import peft

        return peft


def _options(spec: ModelSpec, adapter: Adapter, **more: Any) -> Any:
    """PEFT's own configuration."""
    return _peft().LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(position.module for position in spec.positions),
        task_type="CAUSAL_LM",
        **more,
    )


def _names(spec: ModelSpec) -> dict[str, str]:
    """PEFT's name in a file of every tensor that trains, by our full name."""
    return {
        name: PREFIX + name.replace(f".{NAME}.", ".")
        for name, tensor in spec.tensors.items()
        if tensor.trained
    }


def write(folder: Path, model: LanguageModel, base: Path) -> None:
    """Write the adapter of a model into an existing folder, for ``peft.PeftModel.from_pretrained``.

    Args:
        base: the checkpoint with the frozen weights, to be named.
    Raises:
        OSError: it cannot be written.
    """
    assert model.spec.adapter is not None, "a model without an adapter has none to write"
    names = _names(model.spec)
    trained = {names[name]: each.detach() for name, (_, each) in model.trained().items()}
    named = {name: each.cpu().contiguous() for name, each in trained.items()}
    safetensors.torch.save_file(named, folder / ADAPTER, metadata={"format": "pt"})
    more = {"base_model_name_or_path": str(base), "inference_mode": True}
    _options(model.spec, model.spec.adapter, **more).save_pretrained(str(folder))


@torch.no_grad()
def read(folder: Path, model: LanguageModel) -> None:
    """Inverse of ``write``: into the adapter that is beside a model.

    Raises:
        ConfigError: the file cannot be read, or holds other tensors; every difference.
    """
    path = folder / ADAPTER
    try:
        found: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    names, problems = _names(model.spec), []
    wanted = {names[name]: parameter for name, (_, parameter) in model.trained().items()}
    for name in sorted(wanted.keys() ^ found.keys()):
        problems.append(f"{name} is {'missing' if name in wanted else 'unknown'}")
    for name in wanted.keys() & found.keys():
        if found[name].shape != wanted[name].shape or found[name].dtype != wanted[name].dtype:
            problems.append(f"{name} is {tuple(found[name].shape)}, {found[name].dtype}")
    if problems:
        raise ConfigError([f"{path}: this is not the adapter that was configured", *problems])
    for name, parameter in wanted.items():
        parameter.copy_(found[name])
