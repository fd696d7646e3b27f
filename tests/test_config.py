"""Configurations: to plain values and back, what is refused, and that every field can be set."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from crnet import architectures, linears, optimizers, schedules, streams
from crnet.config import presets, sections
from crnet.config.check import check
from crnet.config.sections import SECTIONS, RunConfig, choose, field_name
from crnet.config.serialize import from_dict, override, read_json, to_dict
from crnet.errors import ConfigError

# Fixed here, so that a change of the defaults moves no message.
BASE = override(
    RunConfig(),
    model={
        "linear": "crnet",
        "rank": "48",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_layers": 8,
        "num_heads": 6,
    },
    train={"batch_size": 16},
)


def problems_of(config: RunConfig) -> list[str]:
    try:
        check(config)
    except ConfigError as error:
        return error.problems
    return []


def fields_of(section: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, default, type) of every field, also of nested sections."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, *path, field.name)
        else:
            yield (*path, field.name), value, hints[field.name]


FIELDS = list(fields_of(RunConfig()))


def another(value: Any, hint: Any) -> Any:
    """A value of the field's type that is not its default."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if typing.get_origin(hint) is tuple:
        return ("a.txt", "b.txt")
    if hint is bool:
        return not value
    return {int: 7, float: 0.375, str: "other", Path: Path("/somewhere/else")}[hint]


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


# There and back


@pytest.mark.parametrize("name", [*presets.PRESETS, *presets.PAPER])
def test_presets_round_trip_and_are_sound(name: str) -> None:
    config = presets.get(name)
    plain = to_dict(config)
    assert from_dict(plain) == config
    assert from_dict(json.loads(json.dumps(plain))) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert config.preset == name
    check(config)


@pytest.mark.parametrize("path", [path for path, _, _ in FIELDS], ids=".".join)
def test_every_field_round_trips_and_can_be_overridden(path: tuple[str, ...]) -> None:
    ((default, hint),) = [(value, hint) for each, value, hint in FIELDS if each == path]
    value = another(default, hint)
    assert value != default
    plain = to_dict(RunConfig())
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    assert path[-1] in inner
    inner[path[-1]] = to_dict_value(value)
    config = from_dict(json.loads(json.dumps(plain)))
    found: Any = config
    for key in path:
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)
    assert to_dict(config) == plain
    if path[0] in SECTIONS:
        assert override(RunConfig(), **nested(path, value)) == config


def to_dict_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def test_sections_are_all_there_is() -> None:
    assert {path[0] for path, _, _ in FIELDS} == {"preset", *SECTIONS}
    methods = {
        field_name(name)
        for seam in (architectures, linears, optimizers, schedules, streams)
        for name in seam.names()
        if seam.get(name).Options is not None
    }
    assert {path[1] for path, _, _ in FIELDS if len(path) == 3} == methods
    assert len(FIELDS) == len({path for path, _, _ in FIELDS}) > 45


def test_every_field_says_what_it_is() -> None:
    """The sentence under a field is its help line."""
    for name in ("BaseModelConfig", "DataConfig", "BaseOptimizerConfig", "TrainConfig"):
        (tree,) = ast.parse(inspect.getsource(getattr(sections, name))).body
        assert isinstance(tree, ast.ClassDef)
        for before, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(before, ast.AnnAssign):
                assert isinstance(before.target, ast.Name)
                from_seam = isinstance(before.value, ast.Call) and (
                    ast.unparse(before.value.func) == "_method"
                )
                assert from_seam or isinstance(after, ast.Expr), (name, before.target.id)


def test_defaults_need_nothing() -> None:
    assert from_dict({}) == RunConfig()
    assert from_dict({"model": {}, "train": {"steps": 3}}).train.steps == 3
    check(RunConfig())


# Overriding


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"stepz": 3}}, "unknown key 'stepz' of TrainConfig; did you mean 'steps'?"),
        ({"model": {"hidden": 3}}, "did you mean 'hidden_size'?"),
        ({"model": {"crnet": {"betas": 1.0}}}, "unknown key 'betas' of CRNetOptions"),
        ({"model": {"crnet": {"beta_int": 1.0}}}, "did you mean 'beta_init'?"),
        ({"optimizer": {"zzz": 3}}, "known: name, lr, beta1, beta2, eps"),
    ],
)
def test_override_names_the_nearest_key(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(RunConfig(), **sections)
    assert says in str(caught.value)


def test_override_changes_nothing_else() -> None:
    base = presets.get("llama-60m")
    changed = override(base, model={"crnet": {"beta_init": 0.1}, "linear": "full"}, train={})
    assert changed.model.crnet.beta_init == 0.1
    assert changed.model.crnet.lr_factor == base.model.crnet.lr_factor
    assert override(changed, model={"crnet": base.model.crnet, "linear": "crnet"}) == base


# Reading


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trainer": {}}, "unknown key trainer"),
        ({"train": {"stepz": 1}}, "unknown key train.stepz"),
        ({"model": {"crnet": {"gamma": 1}}}, "unknown key model.crnet.gamma"),
        ({"train": {"steps": "3"}}, "train.steps is '3', which is not a int"),
        ({"train": {"steps": 3.0}}, "train.steps is 3.0"),
        ({"train": {"steps": True}}, "train.steps is True"),
        ({"train": {"steps": None}}, "train.steps is None"),
        ({"train": {"compile": 1}}, "train.compile is 1"),
        ({"train": {"precision": "fp16"}}, "train.precision is 'fp16'"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr is 'fast'"),
        ({"optimizer": {"lr": True}}, "optimizer.lr is True"),
        ({"model": {"num_kv_heads": "2"}}, "model.num_kv_heads is '2'"),
        ({"data": {"source": "c4"}}, "data.source is 'c4'"),
        ({"data": {"source": [1]}}, "data.source is 1"),
        ({"train": 5}, "train is 5"),
        ({"train": None}, "train is None"),
    ],
)
def test_from_dict_refuses(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert says in str(caught.value)


def test_from_dict_names_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(
            {
                "model": {"rnk": "8", "hidden_size": "wide"},
                "train": {"stepz": 1, "batch_size": 2.5},
            }
        )
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for name in ("model.rnk", "model.hidden_size", "train.stepz", "train.batch_size"):
        assert name in told


def test_whole_numbers_are_numbers() -> None:
    assert from_dict({"optimizer": {"lr": 1}}).optimizer.lr == 1.0
    assert type(from_dict({"optimizer": {"lr": 1}}).optimizer.lr) is float


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    with pytest.raises(ConfigError, match=r"some.json: cannot be read \(No such file"):
        read_json(path)
    for content in (b"", b"{", b"\xff\xfe", b"{'a': 1}"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"some.json: is not valid JSON"):
            read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


# Checking


BAD: list[tuple[dict[str, dict[str, Any]], str, str]] = [
    ({"model": {"hidden_size": 0}}, "--model.hidden-size is 0", "above zero"),
    ({"model": {"hidden_size": -4}}, "--model.hidden-size is -4", "above zero"),
    ({"model": {"intermediate_size": 0}}, "--model.intermediate-size is 0", "above zero"),
    ({"model": {"num_layers": 0}}, "--model.num-layers is 0", "above zero"),
    ({"model": {"num_heads": 0}}, "--model.num-heads is 0", "above zero"),
    ({"model": {"num_kv_heads": 0}}, "--model.num-kv-heads is 0", "above zero"),
    ({"model": {"vocab_size": 0}}, "--model.vocab-size is 0", "above zero"),
    ({"model": {"rope_theta": 0.0}}, "--model.rope-theta is 0.0", "above zero"),
    ({"model": {"norm_eps": 0.0}}, "--model.norm-eps is 0.0", "above zero"),
    ({"model": {"init_std": -0.1}}, "--model.init-std is -0.1", "above zero"),
    ({"model": {"embedding_lr_factor": 0.0}}, "--model.embedding-lr-factor is 0.0", "above zero"),
    ({"model": {"num_heads": 5}}, "--model.num-heads 5", "nearest number of heads"),
    ({"model": {"num_heads": 64}}, "heads of odd size 3", "even"),
    ({"model": {"num_kv_heads": 4}}, "--model.num-kv-heads 4", "not divided"),
    ({"model": {"linear": "crnt"}}, "--model.linear is 'crnt'", "did you mean crnet?"),
    ({"model": {"rank": "193"}}, "rank 193", "192 or less"),
    ({"model": {"rank": "8x3/v=400x7"}}, "--model.rank", "7 blocks"),
    ({"model": {"rank": "8/v=400"}}, "rank 400 to v", "192 or less"),
    ({"model": {"rank": "8/z=4"}}, "'z' is no position", "gate"),
    ({"model": {"rank": ""}}, "--model.rank", "0.25h"),
    ({"model": {"rank": "0"}}, "rank of 0", "1 or more"),
    ({"model": {"rank": "aligned-memory"}}, "aligned-memory", "give numbers"),
    ({"model": {"crnet": {"first_rank": 0}}}, "--model.crnet.first-rank is 0", "1 or more"),
    (
        {"model": {"crnet": {"first_rank": 500}}},
        "--model.crnet.first-rank gives rank 500",
        "192 or less",
    ),
    ({"model": {"crnet": {"lr_factor": 0.0}}}, "--model.crnet.lr-factor is 0.0", "above zero"),
    ({"data": {"source": ()}}, "--data.source is empty", "name a corpus"),
    ({"data": {"validation_frac": 0.0}}, "--data.validation-frac is 0.0", "(0, 1)"),
    ({"data": {"validation_frac": 1.0}}, "--data.validation-frac is 1.0", "(0, 1)"),
    ({"data": {"validation_tokens": 0}}, "--data.validation-tokens is 0", "above zero"),
    ({"data": {"vocab_size": 256}}, "--data.vocab-size is 256", "257"),
    ({"data": {"sequence_length": 1}}, "--data.sequence-length is 1", "2 tokens"),
    ({"data": {"max_documents": 0}}, "--data.max-documents is 0", "above zero"),
    ({"optimizer": {"name": "adam"}}, "--optimizer.name is 'adam'", "did you mean adamw?"),
    ({"optimizer": {"lr": 0.0}}, "--optimizer.lr is 0.0", "above zero"),
    ({"optimizer": {"lr": float("nan")}}, "--optimizer.lr is nan", "above zero"),
    ({"optimizer": {"lr": float("inf")}}, "--optimizer.lr is inf", "finite"),
    ({"optimizer": {"eps": 0.0}}, "--optimizer.eps is 0.0", "above zero"),
    ({"optimizer": {"beta1": 1.0}}, "--optimizer.beta1 is 1.0", "[0, 1)"),
    ({"optimizer": {"beta2": -0.1}}, "--optimizer.beta2 is -0.1", "[0, 1)"),
    ({"optimizer": {"weight_decay": -1.0}}, "--optimizer.weight-decay is -1.0", "zero or more"),
    ({"optimizer": {"warmup_frac": 1.5}}, "--optimizer.warmup-frac is 1.5", "[0, 1]"),
    ({"optimizer": {"min_lr_frac": -0.5}}, "--optimizer.min-lr-frac is -0.5", "[0, 1]"),
    ({"optimizer": {"clip_norm": -1.0}}, "--optimizer.clip-norm is -1.0", "zero or more"),
    ({"train": {"steps": 0}}, "--train.steps is 0", "above zero"),
    ({"train": {"batch_size": 0}}, "--train.batch-size is 0", "above zero"),
    ({"train": {"micro_batch_size": 0}}, "--train.micro-batch-size is 0", "above zero"),
    ({"train": {"micro_batch_size": 5}}, "--train.micro-batch-size 5", "not divided"),
    ({"train": {"threads": 0}}, "--train.threads is 0", "above zero"),
    ({"train": {"seed": -1}}, "--train.seed is -1", "zero or more"),
    ({"train": {"log_every_steps": 0}}, "--train.log-every-steps is 0", "above zero"),
    ({"train": {"eval_every_steps": -1}}, "--train.eval-every-steps is -1", "zero or more"),
    ({"train": {"save_every_steps": -1}}, "--train.save-every-steps is -1", "zero or more"),
    ({"train": {"keep_checkpoints": -1}}, "--train.keep-checkpoints is -1", "zero or more"),
    ({"train": {"invert_tolerance": 0.0}}, "--train.invert-tolerance is 0.0", "above zero"),
    ({"train": {"activation_budget_gib": -1.0}}, "--train.activation-budget-gib is", "above zero"),
    ({"train": {"recompute": "auto"}}, "--train.recompute auto needs", "for example"),
    ({"train": {"activation_budget_gib": 1.0}}, "--train.activation-budget-gib has no", "auto"),
    ({"train": {"recompute_layers": "2"}}, "--train.recompute-layers has no effect", "replay"),
    ({"train": {"recompute_attention": "keep"}}, "--train.recompute-attention keep has", "leave"),
    (
        {"train": {"recompute": "invert"}, "model": {"linear": "lowrank"}},
        "--train.recompute invert: the outputs of lowrank",
        "take replay or block",
    ),
    (
        {"train": {"recompute": "replay", "compile": True}},
        "--train.compile with --train.recompute replay",
        "block",
    ),
    (
        {"train": {"recompute": "replay", "recompute_layers": "3-5"}},
        "--train.recompute-layers '3-5'",
        "every-8",
    ),
    (
        {"train": {"recompute": "replay", "recompute_layers": "2,99"}},
        "--train.recompute-layers 2,99",
        "blocks are 1 to",
    ),
    (
        {"train": {"recompute": "invert", "recompute_layers": "1,3"}},
        "--train.recompute-layers 1,3",
        "never keeps block 1",
    ),
]


@pytest.mark.parametrize(("sections", "came", "wanted"), BAD, ids=[came for _, came, _ in BAD])
def test_check_says_what_came_and_what_was_wanted(
    sections: dict[str, dict[str, Any]], came: str, wanted: str
) -> None:
    problems = problems_of(override(BASE, **sections))
    assert len(problems) >= 1
    assert any(came in problem and wanted in problem for problem in problems), problems


def test_check_names_every_problem_at_once() -> None:
    config = override(
        BASE,
        model={"hidden_size": 30, "num_heads": 4, "norm_eps": 0.0, "linear": "nothing"},
        data={"source": (), "sequence_length": 1, "validation_frac": 2.0},
        optimizer={"name": "nothing", "lr": -1.0, "beta1": 1.0, "clip_norm": -2.0},
        train={"steps": 0, "batch_size": 6, "micro_batch_size": 4, "seed": -1},
    )
    problems = problems_of(config)
    assert len(problems) == 13
    for flag in (
        "--model.hidden-size",
        "--model.norm-eps",
        "--model.linear",
        "--data.source",
        "--data.sequence-length",
        "--data.validation-frac",
        "--optimizer.name",
        "--optimizer.lr",
        "--optimizer.beta1",
        "--optimizer.clip-norm",
        "--train.steps",
        "--train.batch-size",
        "--train.seed",
    ):
        assert sum(flag in problem for problem in problems) >= 1, flag


def test_check_names_a_bad_rank_beside_other_problems() -> None:
    """The rank is a problem of its own wherever the shape that it is held against is sound."""
    config = override(BASE, model={"rank": "999"}, train={"steps": 0})
    problems = problems_of(config)
    assert any("--train.steps" in problem for problem in problems)
    assert any("--model.rank 999" in problem for problem in problems)


def test_check_names_every_position_and_block_of_a_bad_rank() -> None:
    config = override(BASE, model={"rank": "8x6,600", "num_kv_heads": 2})
    told = "\n".join(problems_of(config))
    for positions, limit in (("q, o, gate, up, down", 192), ("k, v", 64)):
        assert f"to {positions} in block 8, above the smaller width there, {limit};" in told


def pairs() -> list[tuple[str, str]]:
    """Every parameterization and every optimizer, each at least once."""
    rows = linears.names()
    of_pairs = [name for name in optimizers.names() if optimizers.get(name).steps_pairs]
    columns = [name for name in optimizers.names() if name not in of_pairs]
    count = max(len(rows), len(columns))
    found = [(rows[idx % len(rows)], columns[idx % len(columns)]) for idx in range(count)]
    return [*found, *(("crnet", name) for name in of_pairs)]  # not every map has factors


@pytest.mark.parametrize(("linear", "optimizer"), pairs())
def test_check_takes_what_is_sound(linear: str, optimizer: str) -> None:
    few = {"blast": {"blocks": 2}} if linear == "blast" else {}  # a width of 2 has no more
    edge = {
        "model": {"linear": linear, "rank": "2", "num_kv_heads": 1, "num_heads": 96} | few,
        "data": {"sequence_length": 2, "vocab_size": 257},
        "optimizer": {"name": optimizer, "warmup_frac": 1.0, "min_lr_frac": 0.0, "beta1": 0.0},
        "train": {"steps": 1, "micro_batch_size": 16, "keep_checkpoints": 0, "seed": 0},
    }
    assert problems_of(override(BASE, **edge)) == []


def test_choosing_another_method_resets_the_options_of_the_former() -> None:
    changed = override(BASE, model={"crnet": {"beta_init": 0.5}}).model
    assert choose(changed, "linear", "crnet") == changed
    other = choose(changed, "linear", "full")
    assert (other.linear, other.crnet) == ("full", BASE.model.crnet)
    assert problems_of(dataclasses.replace(BASE, model=other)) == []


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'llama-6m'.*llama-60m"):
        presets.get("llama-6m")


def test_the_error_is_a_list_and_a_text() -> None:
    assert ConfigError("one").problems == ["one"]
    assert str(ConfigError(["one", "two"])) == "one\ntwo"
