"""Every method behind every seam is held against its contract (``measure.contract``).

None is named here: a new one is covered the moment its file exists.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import crnet
from crnet import architectures, linears, optimizers, schedules, streams
from crnet.config.sections import ModelConfig, OptimizerConfig, RunConfig, field_name
from crnet.measure import contract, contract_cost
from crnet.measure import examples as small
from shapes import is_legal

SEAMS = (linears, streams, architectures, optimizers, schedules)
METHODS = [seam.get(name) for seam in SEAMS for name in seam.names()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_contract(method: Any):
    findings = contract.check(method, only_default=True)
    assert findings
    assert [each for each in findings if not each.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_contract_with_every_example(method: Any):
    findings = contract.check(method)
    assert findings
    assert [each for each in findings if not each.ok] == []


def in_turn(model: ModelConfig, idx: int) -> ModelConfig:
    """In the architecture whose turn it is, or the next one that can have it."""
    names = architectures.names()
    rotated = [names[(idx + more) % len(names)] for more in range(len(names))]
    found = (dataclasses.replace(model, architecture=name) for name in rotated)
    return next(each for each in found if is_legal(each))


@pytest.mark.slow
def test_pairs():
    """Each optimizer with another parameterization, stream and architecture: a covering set."""
    for idx, optimizer in enumerate(optimizers.names()):
        model = dataclasses.replace(
            small.small_model(num_kv_heads=None),
            linear=linears.names()[idx % len(linears.names())],
            stream=streams.names()[idx % len(streams.names())],
        )
        model = in_turn(model, idx + 1)
        base = small.examples(optimizers.get(optimizer))[0]
        example = dataclasses.replace(base, model=model)
        for each in (contract.check_trains, contract.check_resumes, contract.check_state_bytes):
            assert list(each(example)) == [], (optimizer, model, each)


@pytest.mark.slow
def test_every_parameterization_in_every_architecture():
    """What the declarations add up to does not hang on one architecture."""
    for idx, linear in enumerate(linears.names()):
        model = in_turn(
            dataclasses.replace(small.small_model(num_kv_heads=None), linear=linear), idx
        )
        base = small.examples(linears.get(linear))[0]
        example = dataclasses.replace(base, model=model, is_default=False)
        for each in (
            contract_cost.check_kept_bytes,
            contract_cost.check_flops,
            contract_cost.check_recomputation,
        ):
            assert list(each(example)) == [], (linear, model.architecture, each)


def test_a_broken_method_is_found():
    """The contract can fail: declarations that are wrong in one place each."""

    class Broken(type(linears.get("crnet"))):
        def work(self, slot, options, rows, item_bytes):
            work = super().work(slot, options, rows, item_bytes)
            return dataclasses.replace(
                work, kept_bytes=work.kept_bytes + 1, backward_flops=work.backward_flops + 2
            )

    example = small.examples(linears.get("crnet"))[0]
    spec = dataclasses.replace(example.spec, linear=Broken())
    broken = _WithSpec(example.method, example.model, example.optimizer, True, spec)
    assert list(contract_cost.check_kept_bytes(broken))
    assert list(contract_cost.check_flops(broken))


@dataclasses.dataclass(frozen=True)
class _WithSpec(small.Example):
    own: Any = None

    @property
    def spec(self) -> Any:
        return self.own


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.__name__)
def test_unknown_name(seam: Any):
    with pytest.raises(ValueError, match="has no 'nobody'; known: "):
        seam.get("nobody")


def test_options_are_fields_of_the_configuration():
    """A method that has options has them under its name; others have no field. The schedule
    ``linear`` and the key ``model.linear`` are in two sections."""
    for method in METHODS:
        is_of_optimizer = isinstance(method, optimizers.OptimizerMethod | schedules.Schedule)
        section = OptimizerConfig if is_of_optimizer else ModelConfig
        fields = {field.name: field.default for field in dataclasses.fields(section)}
        if method.Options is None:
            assert field_name(method.name) not in fields
        else:
            assert fields[field_name(method.name)] == method.Options()


def test_published_ranks_are_schedules_of_their_shape():
    for name in linears.names():
        method = linears.get(name)
        options = method.Options and method.Options()
        for word, table in method.published_ranks.items():
            assert word.startswith("aligned-") or word in ("s1", "s2", "s3")
            for (hidden_size, num_layers), schedule in table.items():
                fixed = [method.fixed_rank(idx, options) for idx in range(num_layers)]
                ranks = linears.parse_ranks(
                    schedule,
                    num_blocks=fixed.count(None),
                    hidden_size=hidden_size,
                    published={},
                    positions=("q", "down"),
                )
                assert {len(column) for column in ranks.values()} == {fixed.count(None)}


def test_declarations_import_no_torch():
    """Listing, checking and costing every method of every preset loads no torch. What is refused is
    told: what an expert's map cannot have, values without a map of their own, and widths that
    velora's parts do not divide."""
    program = """
import sys
from dataclasses import replace
from crnet import linears
from crnet.config.check import check
from crnet.config.presets import PRESETS
from crnet.cost.table import cost_rows
from crnet.cost.workload import workload
from crnet.errors import ConfigError
refused = set()
for name in linears.names():
    for _, recipe in PRESETS.values():
        run = replace(recipe, model=replace(recipe.model, linear=name, rank="0.25h"))
        try:
            check(run)
        except ConfigError:
            refused.add((name, run.preset))
        else:
            taken = run.model
    assert cost_rows(workload(replace(PRESETS["tiny"][1], model=taken)))
print(*(f"{name}:{preset}" for name, preset in sorted(refused)))
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch"))
"""
    source = str(Path(crnet.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    refused, loaded = done.stdout.splitlines()
    assert refused.split() == [
        *("lax:qwen3-moe-1.8b", "shared:qwen3-moe-1.8b"),
        "value-resformer:mla-130m",
        *("velora:llama-13b", "velora:llama-1b", "velora:llama-70b"),
    ]
    assert loaded == "[]"


def test_the_default_configuration_names_registered_methods():
    from crnet.config.check import check

    check(RunConfig())
