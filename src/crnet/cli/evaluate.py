"""``crnet evaluate``."""

from __future__ import annotations

from crnet.cli.arguments import CheckpointPath, Command, DataFiles, Device, Json, print_json
from crnet.cli.layering import open_checkpoint
from crnet.config.check import check
from crnet.config.sections import DataConfig, RunConfig
from crnet.errors import ConfigError


def evaluate(
    checkpoint: CheckpointPath,
    /,
    *,
    config: DataFiles = (),
    as_json: Json = False,
    device: Device = "auto",
    data: DataConfig = DataConfig(),
) -> None:
    """Evaluate a checkpoint: token-weighted fp32 loss on its validation set, or another corpus."""
    from crnet.data.prepare import prepare as prepare_data
    from crnet.data.rows import Rows, validation_hash
    from crnet.inference import evaluate as evaluation
    from crnet.inference.load import load_model, pick_device

    check(RunConfig(data=data))
    saved = open_checkpoint(checkpoint)
    prepared = prepare_data(data)
    if prepared.tokenizer_hash != saved.extra.get("tokenizer"):
        raise ConfigError(
            f"{saved.folder}: was trained with another tokenizer than this corpus is prepared "
            f"with; give --data.tokenizer {saved.folder}"
        )
    rows = Rows(prepared, "validation", data.sequence_length, data.rows)
    model = load_model(saved, pick_device(device))
    found = evaluation.evaluate(model, rows, data.validation_tokens)
    figures = {
        "checkpoint": str(saved.folder),
        "step": saved.progress.step,
        "val_loss": found.loss,
        "val_perplexity": found.perplexity,
        "val_tokens": found.tokens,
        "validation_hash": validation_hash(rows, data.validation_tokens),
    }
    if as_json:
        print_json(figures)
        return
    print(
        f"{saved.folder}: loss {found.loss:.6f}, perplexity {found.perplexity:.4f} over "
        f"{found.tokens:,} tokens of set {figures['validation_hash'][:12]}"
    )


COMMAND = Command(evaluate, layers="checkpoint")
