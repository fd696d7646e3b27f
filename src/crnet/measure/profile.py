"""The cost model's rows, measured: the same sections and terms, counted on a model that runs.

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
from crnet.config.sections import options_of, settings_of
from crnet.cost.parameters import num_parameters, terms
from crnet.cost.table import CostRow, make_rows, plans
from crnet.cost.workload import Workload
from crnet.kernels import loss
from crnet.measure.memory import peak_bytes, saved_bytes
from crnet.model.build import build
from crnet.optimizers import _low_precision as low_precision
from crnet.recompute.plan import RecomputePlan


def measured(
    work: Workload, device: torch.device, *, seed: int = 0, rounds: int = 3
) -> list[CostRow]:
    """The rows of ``cost.table.cost_rows``, measured; terms that cannot be are missing.

    Args:
        work: the run, all micro-batches of a step.
        device: where.
        seed: of weights and tokens.
        rounds: steps that are timed, after one that is not; their median is reported.
    Cost: a model, its gradients and optimizer state; a handful of micro-batches a policy.
    """
    return Probe(work, device, seed=seed, rounds=rounds).rows()


class Probe:
    """One model on which the terms are counted, each by its own method."""

    def __init__(self, work: Workload, device: torch.device, *, seed: int = 0, rounds: int = 3):
        self.work, self.device, self.rounds = work, device, rounds
        self.micro_batch = micro_batch = work.micro_batch
        dtype = torch.bfloat16 if micro_batch.precision == "bf16" else torch.float32
        self.model = build(work.spec, seed, device, dtype)
        self.model.run_events(0, seed)
        chosen = work.optimizer
        method = optimizers.get(chosen.name)
        options, settings = options_of(chosen, method.name), settings_of(chosen, seed)
        parameters = self.model.trained()
        low_precision.widen_gradients(parameters, work.update, work.num_micro_batches)
        self.optimizer = low_precision.build(method, parameters, options, settings, work.update)
        generator = torch.Generator().manual_seed(seed)
        shape = (micro_batch.sequences, micro_batch.length)
        vocab_size = work.spec.shape.vocab_size
        self.tokens, self.targets = (
            torch.randint(0, vocab_size, shape, generator=generator).to(device) for _ in range(2)
        )

    def rows(self) -> list[CostRow]:
        """Everything that can be measured."""
        known, num_micro = plans(self.work), self.work.num_micro_batches
        flops = {name: num_micro * count for name, count in self.flops().items()}
        kept = {name: self.kept(plan) for name, plan in known.items()}
        peaks = {name: self.peak(plan) for name, plan in known.items()}
        state = self.state()
        seconds = self.seconds()  # last: steps move the betas that invert's guard looks at
        return [
            *make_rows("parameters", "count", self.parameters()),
            *make_rows("state", "bytes", state),
            *make_rows("kept", "bytes", kept),
            *make_rows("peak", "bytes", peaks),
            *make_rows("memory", "bytes", {n: state["total"] + size for n, size in peaks.items()}),
            *make_rows("flops", "count", flops),
            *make_rows("seconds", "s", {"total": seconds}),
        ]

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.micro_batch.precision == "bf16-mixed"
        )

    def forward(self) -> Tensor:
        with self.autocast():
            total, _ = self.model(self.tokens, self.targets)
        return total

    def parameters(self) -> dict[str, int]:
        """By term."""
        counts = dict.fromkeys(num_parameters(self.work.spec), 0)
        term_of = terms(self.work.spec)
        for name, parameter in self.model.named_parameters():
            counts[term_of[name]] += parameter.numel()
        return counts | {"total": sum(p.numel() for p in self.model.parameters())}

    def state(self) -> dict[str, int]:
        """After one step."""
        self.model.recompute(RecomputePlan())
        self.forward().backward()
        self.optimizer.step()
        sizes = {
            "weights": sum(_bytes(each) for each in self.model.parameters()),
            "gradients": sum(_bytes(each.grad) for each in self.model.parameters()),
            "optimizer state": sum(_bytes(each) for each in self.optimizer.state.values()),
        }
        return sizes | {"total": sum(sizes.values())}

    def kept(self, plan: RecomputePlan) -> int:
        self.model.recompute(plan)
        # torch's own loss keeps the head's gradients out of sight.
        with loss.chunked_everywhere(), self.autocast():
            return saved_bytes(self.model, self.tokens, self.targets)

    def peak(self, plan: RecomputePlan) -> int:
        """Of a micro-batch whose gradients add to those that are there; tokens included."""
        self.model.recompute(plan)
        run: Callable[[], None] = lambda: self.forward().backward()  # noqa: E731
        run()
        return peak_bytes(run, self.device) + _bytes(self.tokens)

    def flops(self) -> dict[str, int]:
        """Of one micro-batch."""
        forward, head = self.forward_flops()
        backward = self.backward_flops(RecomputePlan())
        parts = {
            "blocks forward": forward,
            "blocks backward": backward,
            "recomputation": self.backward_flops(self.work.plan) - backward,
            "head forward": head // 3,
            "head backward": head - head // 3,
        }
        return parts | {"total": sum(parts.values())}

    def forward_flops(self) -> tuple[int, int]:
        """Of the blocks, and of the head with its gradients, which the loss computes at once."""
        self.model.recompute(RecomputePlan())
        with sdpa_kernel(SDPBackend.MATH), loss.chunked_everywhere():
            with FlopCounterMode(display=False) as both:
                self.forward()
            with FlopCounterMode(display=False) as blocks, torch.no_grad(), self.autocast():
                self.model.hidden(self.tokens)
        return blocks.get_total_flops(), both.get_total_flops() - blocks.get_total_flops()

    def backward_flops(self, plan: RecomputePlan) -> int:
        self.model.recompute(plan)
        with sdpa_kernel(SDPBackend.MATH):
            total = self.forward()
            with FlopCounterMode(display=False) as counter:
                total.backward()
        return counter.get_total_flops()

    def seconds(self) -> float:
        """Of an optimizer step under the run's own plan."""
        self.model.recompute(self.work.plan)
        times = []
        for _ in range(self.rounds + 1):
            start_s = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            for _ in range(self.work.num_micro_batches):
                self.forward().backward()
            self.optimizer.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start_s)
        return statistics.median(times[1:])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(each) for each in value.values()) if isinstance(value, dict) else 0
