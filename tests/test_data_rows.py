"""Rows, batches and the validation rows, against naive references. Every equality is exact."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tokenizers
import torch

from crnet.config.sections import DataConfig
from crnet.data.order import order
from crnet.data.prepare import prepare
from crnet.data.rows import Batches, Rows, check_enough, validation_batches, validation_hash
from crnet.data.shards import Prepared, ShardWriter
from crnet.data.sources import documents
from crnet.errors import ConfigError

Mode = Literal["packed", "document"]
SHARED = Path(os.environ.get("CRNET_SHARED") or Path(__file__).parents[2] / "shared")
T5_JSON = SHARED / "data" / "tokenizers" / "t5-tokenizer.json"
needs_shared = pytest.mark.skipif(
    not T5_JSON.is_file(), reason=f"no {T5_JSON}; set CRNET_SHARED to the shared folder"
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Random ids in several shards of each split, in documents of every length that matters."""
    folder, random = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    edges = [2, 3, 4, 63, 64, 65, 66, 299, 300, 301, 302]
    parts = {}
    for split, num_documents in (("train", 800), ("validation", 400)):
        writer = ShardWriter(folder, split, "uint16", 20_000)
        for length in random.permutation([*edges, *(1 + random.geometric(1 / 80, num_documents))]):
            writer.write(np.append(random.integers(1, 512, length - 1), 0), text_bytes=0)
        writer.close()
        parts[split] = writer.part()
        assert len(parts[split].shards) > 1
    return Prepared(folder, 512, 0, None, "uint16", "", parts, {}, {})


def shards_of(made: Prepared, split: str) -> list[list[list[int]]]:
    """Per shard, per document, the ids."""
    found = []
    for shard in made.parts[split].shards:
        ids = np.fromfile(made.folder / f"{shard.name}.bin", "<u2")
        starts = np.fromfile(made.folder / f"{shard.name}.idx", "<u8").astype(int)
        found.append([part.tolist() for part in np.split(ids, starts[1:])])
    return found


def naive_packed(made: Prepared, split: str, length: int) -> list[tuple[list, list]]:
    rows = []
    for shard in shards_of(made, split):
        stream = [token for document in shard for token in document]
        for start in range(0, len(stream) - length, length):
            window = stream[start : start + length + 1]
            rows.append((window[:-1], window[1:]))
    return rows


def naive_documents(made: Prepared, split: str, length: int) -> list[tuple[list, list]]:
    rows = []
    pad_id = made.eos_id if made.pad_id is None else made.pad_id
    for document in (d for shard in shards_of(made, split) for d in shard):
        if len(document) > length:
            document = [*document[: length - 1], made.eos_id]
        padding = length - len(document)
        rows.append((document + [pad_id] * padding, document[1:] + [-100] * (padding + 1)))
    return rows


@pytest.mark.parametrize("length", [2, 64, 300])
@pytest.mark.parametrize(("mode", "pad_id"), [("packed", 7), ("document", None), ("document", 7)])
def test_rows_equal_a_naive_reference(
    mode: Mode, pad_id: int | None, length: int, prepared: Prepared
) -> None:
    made = dataclasses.replace(prepared, pad_id=pad_id)
    rows = Rows(made, "train", length, mode)
    naive = (naive_packed if mode == "packed" else naive_documents)(made, "train", length)
    assert len(rows) == len(naive)
    indices = order(3, len(rows), 0, min(len(rows), 3000))
    tokens, targets = rows.batch(indices)
    for tensor, side in ((tokens, 0), (targets, 1)):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        assert tensor.tolist() == [naive[i][side] for i in indices]
    one = rows.batch(indices[:1])
    assert torch.equal(one[0], tokens[:1])
    assert torch.equal(one[1], targets[:1])
    assert rows.batch(indices[:0])[0].shape == (0, length)
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.batch(np.array([outside]))


@needs_shared
def test_document_rows_are_those_of_the_published_protocol(tmp_path: Path) -> None:
    """C4 documents, T5 ids, truncation and padding as the tokenizers library itself does them."""
    source = SHARED / "data" / "c4-sample" / "c4-en-pfdecoding-1480.jsonl.xz"
    data = DataConfig(
        source=(str(source),), tokenizer=str(T5_JSON), cache_dir=tmp_path, max_documents=200
    )
    prepared = prepare(data, progress=False)
    texts = [document.text for document in documents(data) if document.split == "train"]
    for length in (256, 64):
        rows = Rows(prepared, "train", length, "document")
        tokens, targets = rows.batch(np.arange(len(rows)))
        library = tokenizers.Tokenizer.from_file(str(T5_JSON))
        library.enable_truncation(length)
        library.enable_padding(length=length, pad_id=0)
        expected = torch.tensor([encoding.ids for encoding in library.encode_batch(texts)])
        assert torch.equal(tokens, expected)
        labels = expected.masked_fill(expected == 0, -100)
        assert torch.equal(targets[:, :-1], labels[:, 1:])
        assert (targets[:, -1] == -100).all()
        cut = tokens[:, -1] != 0
        assert cut.any()
        assert (tokens[cut, -1] == 1).all(), "a document that is cut keeps its end token"


def test_wrong_rows(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match=r"--data\.sequence-length must be at least 2"):
        Rows(prepared, "train", 1)
    rows = Rows(prepared, "train", 64)
    check_enough(rows, len(rows))
    with pytest.raises(ConfigError, match=r"smaller --train.batch-size .*--data.sequence-length"):
        Batches(rows, 0, len(rows) + 1)
    short = Rows(prepared, "validation", 10**6)
    assert len(short) == 0
    with pytest.raises(ConfigError, match=r"--data.validation-frac.*--data.sequence-length"):
        next(validation_batches(short, 1, 10**9))


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_global_batch_does_not_depend_on_how_it_is_cut(mode: Mode, prepared: Prepared) -> None:
    rows = Rows(prepared, "train", 64, mode)
    wanted = [rows.batch(order(5, len(rows), 12 * step, 12)) for step in range(3)]
    for world_size, micro_batch_size in itertools.product((1, 2, 3, 4), (1, 3, 5, 12, None)):
        processes = [Batches(rows, 5, 12) for _ in range(world_size)]
        for step, expected in enumerate(wanted):
            parts = [
                part
                for rank, batches in enumerate(processes)
                for part in batches.next(micro_batch_size, rank, world_size)
            ]
            assert all(len(part[0]) <= (micro_batch_size or 12) for part in parts)
            for side in (0, 1):
                assert torch.equal(torch.cat([part[side] for part in parts]), expected[side])
            assert {batches.position for batches in processes} == {12 * (step + 1)}


def test_position_resumes_in_the_middle_of_an_epoch(prepared: Prepared) -> None:
    rows = Rows(prepared, "validation", 256)
    batch_size = len(rows) // 2 + 1  # the second batch crosses into the next epoch
    whole = Batches(rows, 9, batch_size)
    steps = [whole.next()[0] for _ in range(5)]
    resumed = Batches(rows, 9, batch_size, position=2 * batch_size)
    for step in steps[2:]:
        (batch,) = resumed.next()
        assert torch.equal(batch[0], step[0])
        assert torch.equal(batch[1], step[1])
    with pytest.raises(ConfigError, match="take a multiple of 7"):
        Batches(rows, 9, 8).next(world_size=7)


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_validation_rows_do_not_depend_on_the_batch_size(mode: Mode, prepared: Prepared) -> None:
    rows = Rows(prepared, "validation", 32, mode)
    read_by_size = []
    for batch_size in (1, 7, 1000):
        parts = list(validation_batches(rows, batch_size, 1000))
        read_by_size.append([torch.cat(side) for side in zip(*parts, strict=True)])
    (tokens, targets), *others = read_by_size
    for other in others:
        assert torch.equal(other[0], tokens)
        assert torch.equal(other[1], targets)
    used = tokens.numel() if mode == "packed" else int((targets != -100).sum()) + len(tokens)
    assert 1000 - 32 < used <= 1000
    assert validation_hash(rows, 1000) == validation_hash(rows, 1000)
    assert validation_hash(rows, 1000) != validation_hash(rows, 900)
    assert len(list(validation_batches(rows, 8, 1))) == 1, "at least one row"
    assert sum(len(t) for t, _ in validation_batches(rows, 8, 10**9)) == len(rows)


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_a_shortened_validation_set_is_spread_over_the_whole(
    mode: Mode, prepared: Prepared
) -> None:
    """Not its first rows, which would be the first files of a corpus; always the same ones."""
    rows = Rows(prepared, "validation", 32, mode)
    whole = rows.within(10**9)
    assert whole.tolist() == list(range(len(rows)))
    third = rows.within(len(rows) * 32 // 3 if mode == "packed" else 20 * len(rows) // 3)
    assert (np.diff(third) > 0).all()
    counts = np.histogram(third, 3, (0, len(rows)))[0]
    assert counts.min() > 0.6 * counts.mean(), counts
    assert set(rows.within(300)) < set(rows.within(900)) < set(rows.within(3000))
    again = Rows(prepared, "validation", 32, mode)
    assert again.within(900).tolist() == rows.within(900).tolist()


@pytest.mark.slow
def test_reading_speed(tmp_path: Path) -> None:
    """At least 20 million tokens a second on one core, from warm shards of the default corpus."""
    made = prepare(DataConfig(cache_dir=tmp_path), progress=False)
    for mode in ("packed", "document"):
        rows = Rows(made, "train", 256, mode)
        indices = order(0, len(rows), 0, 64 * 16).reshape(64, 16)
        speeds = []
        for _ in range(10):
            start_s = time.process_time()  # of this process: others may be busy
            num_tokens = sum(rows.batch(batch)[0].numel() for batch in indices)
            speeds.append(num_tokens / (time.process_time() - start_s))
        assert max(speeds) >= 20e6, mode
