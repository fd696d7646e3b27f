"""``crnet prepare``."""

from __future__ import annotations

from crnet.cli.arguments import Command, DataFiles, Json, print_json
from crnet.config.check import check
from crnet.config.sections import DataConfig, RunConfig
from crnet.config.serialize import read_json


def prepare(
    *, config: DataFiles = (), as_json: Json = False, data: DataConfig = DataConfig()
) -> None:
    """Turn a corpus into token shards; train does it by itself and finds them again."""
    check(RunConfig(data=data))

    from crnet.data.prepare import prepare as prepare_data

    prepared = prepare_data(data)
    meta = read_json(prepared.folder / "meta.json")
    if as_json:
        print_json({"folder": str(prepared.folder), **meta})
        return
    print(f"{prepared.folder}: vocabulary {prepared.vocab_size:,}, {prepared.dtype}")
    for split, part in prepared.parts.items():
        print(f"{split:12}{part.documents:>12,} documents{part.tokens:>16,} tokens")


COMMAND = Command(prepare, layers="data")
