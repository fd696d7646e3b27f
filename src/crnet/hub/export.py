"""A checkpoint's model as a folder to hand on: weights, tokenizer, configuration, card.

``hf``: the model as it is, for ``crnet.hf``; an adapter is merged into it (``hub.merge``).
``peft``: an adapter kept apart. ``hf-llama``: every map merged into a matrix, for who has no crnet;
where a map is one. A carry makes a map depend on the inputs of several blocks, and an activation
inside one makes it no linear map: then no matrix has its values, and the export is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from crnet.config.model_spec import ModelSpec, model_spec
from crnet.errors import ConfigError
from crnet.hub import files
from crnet.hub.card import Evaluated, card
from crnet.hub.merge import merged_adapter
from crnet.inference.evaluate import evaluation_of
from crnet.inference.load import load_model, load_tokenizer
from crnet.model.language_model import LanguageModel
from crnet.storage import checkpoint, metrics
from crnet.storage.checkpoint import Checkpoint


def export(saved: Checkpoint, target: Path) -> None:
    """Write the model as it is, without the optimizer's state.

    A card or a configuration that was edited in the checkpoint is copied.

    Raises:
        ConfigError: ``target`` holds something or cannot be written; a file is damaged; an adapter
            cannot be merged.
    Cost: the weights whole in memory; of an adapter twice.
    """
    tokenizer, config = load_tokenizer(saved), saved.config
    if saved.is_adapter:
        config, model = merged_adapter(saved)
        weights: dict[str, Tensor] = dict(model.named_parameters())
    else:
        weights = saved.weights()
    with checkpoint.new_folder(target, saved) as folder:
        checkpoint.write_weights(folder, weights)
        tokenizer.save(folder)
        files.write(tokenizer, folder, config, saved.progress, evaluated(saved))
        if not saved.is_adapter:
            saved.beside(folder)


def export_adapter(saved: Checkpoint, target: Path) -> None:
    """Write an adapter as PEFT reads it, apart from the weights under it, without the optimizer's
    state.

    Raises:
        ConfigError: the checkpoint holds a whole model; or as ``export``.
    """
    if not saved.is_adapter:
        raise ConfigError(f"{saved.folder}: holds a whole model and no adapter; take --to hf")
    with checkpoint.new_folder(target, saved) as folder:
        for name in saved.other_files():
            shutil.copy(saved.folder / name, folder)
        saved.beside(folder)


def export_plain(saved: Checkpoint, target: Path) -> None:
    """Write the model as one of transformers' own, every map merged into a matrix, in fp32.

    Raises:
        ConfigError: every reason why it cannot be merged; or as ``export``.
    Cost: the dense model whole in memory, beside the one that is merged.
    Numerics: logits differ by the rounding of the merged products; of dense maps not at all.
    """
    config, tokenizer = saved.config, load_tokenizer(saved)
    spec = model_spec(config.model)
    if problems := list(plain_problems(spec)):
        raise ConfigError(problems)
    if saved.is_adapter:
        config, model = merged_adapter(saved)
    else:
        model = load_model(saved)
    form = spec.architecture.plain_form(spec.shape, spec.architecture_options)
    assert form is not None
    sizes = files.sizes(config, tokenizer.eos_id, tokenizer.pad_id)
    described = {**sizes, **form, "dtype": "float32"}
    weights = merged(model)
    with checkpoint.new_folder(target, saved) as folder:
        checkpoint.write_weights(folder, weights)
        tokenizer.save(folder)
        files.write_configs(folder, described, tokenizer)
        text = card(config, saved.progress, evaluated(saved), is_plain=True)
        (folder / files.CARD).write_text(text, encoding="utf-8")


def plain_problems(spec: ModelSpec) -> Iterator[str]:
    """Why a model is none of transformers' own, one sentence each."""
    if spec.architecture.plain_form(spec.shape, spec.architecture_options) is None:
        yield f"{spec.architecture.name}: transformers has no model with its tensors; take --to hf"
    if not spec.stream.adds:
        yield (
            f"{spec.stream.name}: sublayers read more than the sum of what was written, which no "
            "model of transformers does; take --to hf"
        )
    if any(spec.reads):
        yield (
            f"{spec.linear.name}: a map reads what an earlier block computed from another input "
            "(its carry), so that no matrix has its values; take --to hf"
        )
    if not spec.keeps_activation:
        yield (
            f"{spec.linear.name}: the feed-forward goes without the architecture's activation; "
            "take --to hf"
        )


def merged(model: LanguageModel) -> dict[str, Tensor]:
    """Every tensor of the plain model by its name, fp32.

    Raises:
        ConfigError: a map is not linear.
    """
    spec, found = model.spec, {}
    maps = spec.slot_of
    blocks = model.model.blocks()
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        if name in spec.shared:  # in every map's matrix
            continue
        if owner not in maps or own == "bias":
            found[name] = parameter.detach().float()
        elif f"{owner}.weight" not in found:
            slot = maps[owner]
            try:
                weight = blocks[slot.layer_idx].maps[slot.position].dense_weight()
            except NotImplementedError as error:
                raise ConfigError(f"{spec.linear.name}: {error}; take --to hf") from error
            found[f"{owner}.weight"] = weight
    return found


def evaluated(saved: Checkpoint) -> Evaluated | None:
    """The run's latest evaluation at the checkpoint or before."""
    path = saved.folder.parent.parent / metrics.METRICS
    rows = metrics.read(path) if path.is_file() else []
    known = [
        (row["step"], evaluation_of(row))
        for row in rows
        if "val_loss" in row and row["step"] <= saved.progress.step
    ]
    return known[-1] if known else None
