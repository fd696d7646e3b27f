"""What an optimizer remembers: that it comes back in the dtype it had, and what is forgotten.

Equality is by bits.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from crnet import optimizers
from crnet.linears._maps import LinearMap, LowRankMap
from crnet.model.seeds import generator_of
from crnet.optimizers import Settings, forget, load_state
from crnet.optimizers.adamw import AdamW, param_groups
from crnet.specs import Forget, TensorSpec, constant
from crnet.storage import checkpoint
from test_train import run, tiny


class WideState(torch.optim.Optimizer):
    """Plain descent with states in dtypes that are not those of the parameters."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["moment"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["count"] = torch.full_like(parameter, 2**24 + 1, dtype=torch.int32)
                    state["nested"] = {"wide": [torch.ones(3, dtype=torch.float64) / 3]}
                state["step"] += 1
                state["count"] += 1
                state["moment"].lerp_(parameter.grad.float(), 0.1)
                parameter -= group["lr"] * state["moment"].to(parameter.dtype)


def assert_same(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list):
        for pair in zip(found, wanted, strict=True):
            assert_same(*pair)
    else:
        assert found == wanted


def stepped(optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(7)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise.to(parameter.dtype)
    optimizer.step()


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(4, 3, dtype=dtype)) for _ in range(2)]


def test_states_keep_their_dtype_on_load() -> None:
    first = WideState([{"params": parameters(torch.bfloat16), "lr": 0.1}])
    stepped(first)
    saved = first.state_dict()
    second = WideState([{"params": parameters(torch.bfloat16), "lr": 0.1}])
    load_state(second, saved)
    assert_same(second.state_dict(), saved)
    # What torch alone makes of it: the test would not pass without a difference.
    second.load_state_dict(saved)
    assert second.state_dict()["state"][0]["count"].dtype == torch.bfloat16


def test_a_resumed_run_in_bf16_goes_on_with_states_in_fp32(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wide(AdamW):
        def build(self, parameters, options, settings):
            return WideState(param_groups(parameters, settings))

    monkeypatch.setattr(optimizers, "get", lambda name: Wide())
    precision = {"precision": "bf16", "bf16_update": "plain"}  # the method's own work on bf16
    config = tiny(corpus, train={**precision, "steps": 6, "save_every_steps": 3})
    run(config, tmp_path / "whole")
    run(config, tmp_path / "halves")
    (tmp_path / "halves" / "checkpoints" / "step_6").rename(tmp_path / "aside")
    run(config, tmp_path / "halves", resume=True)
    ours, wanted = (checkpoint.newest(tmp_path / name) for name in ("halves", "whole"))
    assert ours is not None
    assert wanted is not None
    assert_same(ours.weights(), wanted.weights())
    assert_same(ours.state()["optimizer"], wanted.state()["optimizer"])
    assert {each["moment"].dtype for each in ours.state()["optimizer"]["state"].values()} == {
        torch.float32
    }


def adamw(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    spec = TensorSpec(tuple(parameter.shape), "matrix", constant(0.0))
    settings = Settings(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, seed=0)
    return AdamW().build({"weight": (spec, parameter)}, None, settings)


def test_forget_everything_but_the_counter() -> None:
    parameter = torch.nn.Parameter(torch.ones(5, 4))
    optimizer = adamw(parameter)
    stepped(optimizer)
    forget(optimizer, parameter, Forget("weight"), generator_of(0, "weight", "1", "forget"))
    state = optimizer.state[parameter]
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()
    assert state["step"] == 1
    stepped(optimizer)
    assert state["step"] == 2


def test_forget_leaves_a_share_and_the_same_items_of_every_state() -> None:
    parameter = torch.nn.Parameter(torch.ones(100, 100))
    optimizer = adamw(parameter)
    stepped(optimizer)
    before = optimizer.state[parameter]["exp_avg"].clone()
    generator = generator_of(0, "weight", "1", "forget")
    forget(optimizer, parameter, Forget("weight", kept_frac=0.1), generator)
    state = optimizer.state[parameter]
    kept = state["exp_avg"] != 0
    assert torch.equal(kept, state["exp_avg_sq"] != 0)
    assert torch.equal(state["exp_avg"][kept], before[kept])
    # Six deviations of a binomial count of ten thousand; the seed is fixed.
    assert abs(int(kept.sum()) - 1000) < 6 * math.sqrt(10_000 * 0.1 * 0.9)
    other = adamw(parameter)
    stepped(other)
    forget(
        other, parameter, Forget("weight", kept_frac=0.1), generator_of(0, "weight", "1", "forget")
    )
    assert torch.equal(other.state[parameter]["exp_avg"], state["exp_avg"])


def test_forget_what_has_no_state_yet() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = adamw(parameter)
    forget(optimizer, parameter, Forget("weight"), torch.Generator())
    assert parameter not in optimizer.state


def test_events_come_after_their_step_and_the_optimizer_forgets(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first factor of every map is doubled before the first step and after steps 2 and 4."""
    from crnet.linears.lowrank import METHODS

    method = type(METHODS[0])
    seen = []

    def run_event(self: LinearMap, event: str, generator: torch.Generator) -> tuple[Forget, ...]:
        seen.append((event, int(torch.randint(1000, (1,), generator=generator))))
        self.A.mul_(2)
        return (Forget("A"),)

    monkeypatch.setattr(method, "events", lambda self, step, options: ("double",) * (step % 2 == 0))
    monkeypatch.setattr(LowRankMap, "run_event", run_event)
    config = tiny(corpus, model={"linear": "lowrank"}, train={"steps": 4, "save_every_steps": 1})
    result = run(config, tmp_path / "run")
    num_maps = 7 * 3
    assert len(seen) == 3 * num_maps
    assert len({number for _, number in seen}) > num_maps  # each has a generator of its own
    assert result.checkpoint is not None
    saved = checkpoint.load(result.checkpoint)
    names = [name for g in saved.state()["optimizer"]["param_groups"] for name in g["names"]]
    states = saved.state()["optimizer"]["state"]
    for index, name in enumerate(names):
        assert states[index]["exp_avg"].any() == (not name.endswith(".A")), name
        assert states[index]["step"] == 4
    result.checkpoint.rename(tmp_path / "aside")
    wanted = torch.load(tmp_path / "aside" / "state.pt", weights_only=True)["optimizer"]
    run(config, tmp_path / "run", resume=True)
    redone = checkpoint.newest(tmp_path / "run")
    assert redone is not None
    assert_same(redone.state()["optimizer"], wanted)
