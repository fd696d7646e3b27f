"""The cost model's table, measured: the same sections and terms, counted on a model that runs.

Parameters by ``numel``, state by walking it, kept activations by hooks, FLOPs by torch's counter,
peaks by a trace of every allocation (CPU) or the allocator (GPU), the step by a clock. Tokens are
random: no cost hangs on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crnet import optimizers
from crnet.config.sections import RunConfig
from crnet.cost import activations as cost
from crnet.cost import table as estimate
from crnet.cost.activations import Plan
from crnet.cost.table import Table
from crnet.kernels import loss
from crnet.measure.memory import peak_bytes, saved_bytes
from crnet.model.backbone import build
from crnet.recompute.engine import Recomputation


def measured(config: RunConfig, predicted: Table, device: torch.device, rounds: int = 3) -> Table:
    """The sections of ``predicted`` measured; terms that cannot be are missing.

    Args:
        config: as for training; ``train.batch_size`` rows a step, in micro-batches.
        predicted: ``estimate.table`` of it.
        device: where.
        rounds: steps that are timed, after one that is not; their median is reported.
    Cost: a model, its gradients and optimizer state; a handful of micro-batches a policy.
    """
    return Probe(config, device, rounds).table(predicted)


class Probe:
    """One model on which the terms are counted, each by its own method."""

    def __init__(self, config: RunConfig, device: torch.device, rounds: int):
        self.config = config = estimate.resolved(config)
        self.device, self.rounds = device, rounds
        self.step = estimate.step_of(config)
        self.model = build(config.model, config.train.seed, device)
        if config.train.precision == "bf16":
            self.model.bfloat16()
        method = optimizers.get(config.optimizer.name)
        self.optimizer = method.build(self.model.optimizer_groups(), config.optimizer)
        generator = torch.Generator().manual_seed(config.train.seed)
        shape = (self.step.sequences, self.step.length)
        self.tokens, self.targets = (
            torch.randint(0, config.model.vocab_size or 1, shape, generator=generator).to(device)
            for _ in range(2)
        )

    def table(self, predicted: Table) -> Table:
        config, num_micro = self.config, self.config.train.batch_size // self.step.sequences
        chosen = cost.plan(config)
        backward = self.backward_flops(Plan())
        forward, head = self.forward_flops()
        flops = {
            "blocks forward": forward,
            "blocks backward": backward,
            "recomputation": self.backward_flops(chosen) - backward,
            "head forward": head // 3,
            "head backward": head - head // 3,
        }
        plans = estimate.policies(config)
        kept = {name: self.kept(plan) for name, plan in plans.items()}
        peaks = {name: self.peak(plan) for name, plan in plans.items()}
        seconds = self.seconds(chosen)  # last: steps move the betas that invert's guard looks at
        values: dict[str, dict[str, float]] = {
            "parameters": dict(self.parameters()),
            "state": dict(self.state()),
            "activations kept": dict(kept),
            "activations at": dict(peaks),
            "FLOPs": {
                name: num_micro * count
                for name, count in (flops | {"total": sum(flops.values())}).items()
            },
            "seconds": {"total": seconds},
        }
        found: Table = {}
        for section in predicted:
            for start, terms in values.items():
                if section.startswith(start):
                    found[section] = terms
        total = values["state"]["total"]
        found["memory at the peak, bytes"] = {name: total + it for name, it in peaks.items()}
        return found

    def use(self, plan: Plan) -> None:
        self.model.model.recomputation = Recomputation(plan)

    def autocast(self) -> torch.autocast:
        mixed = self.config.train.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def forward(self) -> Tensor:
        with self.autocast():
            total, _ = self.model(self.tokens, self.targets)
        return total

    def parameters(self) -> dict[str, int]:
        counts: dict[str, int] = dict.fromkeys(estimate.shapes(self.config.model), 0)
        for name, parameter in self.model.named_parameters():
            counts[_term(name, parameter)] += parameter.numel()
        return counts | {"total": sum(p.numel() for p in self.model.parameters())}

    def state(self) -> dict[str, int]:
        """After one step."""
        self.use(Plan())
        self.forward().backward()
        self.optimizer.step()
        sizes = {
            "weights": sum(_bytes(it) for it in self.model.parameters()),
            "gradients": sum(_bytes(it.grad) for it in self.model.parameters()),
            "optimizer state": sum(_bytes(it) for it in self.optimizer.state.values()),
        }
        return sizes | {"total": sum(sizes.values())}

    def kept(self, plan: Plan) -> int:
        self.use(plan)
        # torch's own loss keeps the head's gradients out of sight.
        with loss.chunked_everywhere(), self.autocast():
            return saved_bytes(self.model, self.tokens, self.targets)

    def peak(self, plan: Plan) -> int:
        """Of a micro-batch whose gradients add to those that are there; tokens included."""
        self.use(plan)
        run: Callable[[], None] = lambda: self.forward().backward()  # noqa: E731
        run()
        return peak_bytes(run, self.device) + _bytes(self.tokens)

    def forward_flops(self) -> tuple[int, int]:
        """Of the blocks, and of the head with its gradients, which the loss computes at once."""
        self.use(Plan())
        with sdpa_kernel(SDPBackend.MATH), loss.chunked_everywhere():
            with FlopCounterMode(display=False) as both:
                self.forward()
            with FlopCounterMode(display=False) as blocks, torch.no_grad():
                self.model.model(self.tokens)
        return blocks.get_total_flops(), both.get_total_flops() - blocks.get_total_flops()

    def backward_flops(self, plan: Plan) -> int:
        self.use(plan)
        with sdpa_kernel(SDPBackend.MATH):
            total = self.forward()
            with FlopCounterMode(display=False) as counter:
                total.backward()
        return counter.get_total_flops()

    def seconds(self, plan: Plan) -> float:
        self.use(plan)
        times = []
        for _ in range(self.rounds + 1):
            start_s = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            for _ in range(self.config.train.batch_size // self.step.sequences):
                self.forward().backward()
            self.optimizer.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start_s)
        return statistics.median(times[1:])


def _term(name: str, parameter: Tensor) -> str:
    """The cost model's term of a parameter, by its name in the model."""
    if name.startswith("lm_head."):
        return "head"
    if "embed_tokens" in name:
        return "embedding"
    if "norm" in name:
        return "norms"
    position, own = name.split(".")[-2:]
    return position.removesuffix("_proj") if parameter.dim() > 1 else f"{own}s"


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(it) for it in value.values()) if isinstance(value, dict) else 0
