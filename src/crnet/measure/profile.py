"""The cost model's rows, measured: the same sections and terms, counted on a model that runs.

Parameters by ``numel``, state by walking it, kept activations by hooks, FLOPs by torch's counter on
tensors without memory (MATH attention would hold every pair of tokens), peaks by a trace of every
allocation (CPU) or the allocator (GPU), the step by a clock. Tokens are random: no cost hangs on
them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crnet import optimizers
from crnet.config.sections import options_of, settings_of
from crnet.cost.parameters import ACTIVE, num_parameters, terms
from crnet.cost.table import CostRow, make_rows, plans
from crnet.cost.workload import Workload
from crnet.errors import ConfigError
from crnet.kernels.carried_cuda import FLOPS
from crnet.measure.memory import peak_bytes, saved_bytes
from crnet.measure.traffic import without_memory
from crnet.model.build import build
from crnet.model.language_model import LanguageModel
from crnet.model.padding import stored_on
from crnet.model.seeds import generator_of
from crnet.optimizers import _low_precision as low_precision
from crnet.optimizers._fused_backward import waits
from crnet.optimizers._fused_backward.module import FusedBackward
from crnet.recompute.plan import RecomputePlan
from crnet.specs import TensorSpec


def measured(
    work: Workload, device: torch.device, *, seed: int = 0, rounds: int = 3
) -> list[CostRow]:
    """The rows of ``cost.table.cost_rows``, measured; terms that cannot be are missing.

    Args:
        work: the run, all micro-batches of a step.
        device: where.
        seed: of weights and tokens.
        rounds: steps that are timed, after one that is not; their median is reported.
    Raises:
        ConfigError: the run trains an adapter, which the predictions leave out.
    Cost: a model, its gradients and optimizer state; a handful of micro-batches a policy.
    """
    if work.spec.adapter is not None:
        raise ConfigError(
            "--train.adapter: there is no prediction to measure, the cost model leaves an adapter "
            "out; leave it out too, or read peak_bytes of the run's metrics.jsonl"
        )
    return Probe(work, device, seed=seed, rounds=rounds).rows()


class Probe:
    """One model on which the terms are counted, each by its own method."""

    def __init__(self, work: Workload, device: torch.device, *, seed: int = 0, rounds: int = 3):
        self.work, self.device, self.rounds = work, device, rounds
        self.micro_batch = micro_batch = work.micro_batch
        dtype = torch.bfloat16 if micro_batch.precision == "bf16" else torch.float32
        chosen = work.optimizer
        method = optimizers.get(chosen.name)
        self.model = build(stored_on(work.spec, device, method), seed, device, dtype)
        self.model.run_events(0, seed)
        options, settings = options_of(chosen, method.name), settings_of(chosen, seed)
        parameters = self.model.trained()
        low_precision.widen_gradients(parameters, work.update, work.num_micro_batches)
        self.optimizer = low_precision.build(method, parameters, options, settings, work.update)
        self.held = _Held(parameters)  # its hooks come before those that free
        decay = chosen.weight_decay if chosen.decay == "composed" else 0.0
        self.fused = FusedBackward(method, self.optimizer, parameters, composed_decay=decay)
        generator = generator_of(seed, "tokens")
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
        gradients = self.gradients(state)
        seconds = self.seconds()  # last: steps move the betas that invert's guard looks at
        return [
            *make_rows("parameters", "count", self.parameters()),
            *make_rows("state", "bytes", state),
            *make_rows("gradients", "bytes", gradients),
            *make_rows("kept", "bytes", kept),
            *make_rows("peak", "bytes", peaks),
            *make_rows("memory", "bytes", {n: state["total"] + size for n, size in peaks.items()}),
            *make_rows("flops", "count", flops),
            *make_rows("seconds", "s", {"eager: total": seconds}),
        ]

    def autocast(self, device: str | None = None) -> torch.autocast:
        device = device or self.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.micro_batch.is_mixed)

    def forward(self) -> Tensor:
        with self.autocast():
            total, _ = self.model(self.tokens, self.targets)
        return total

    def parameters(self) -> dict[str, int]:
        """By term."""
        term_of = terms(self.work.spec)
        counts = {term: 0 for term in num_parameters(self.work.spec) if term != ACTIVE}
        for name, parameter in self.model.named_parameters():
            counts[term_of[name]] += parameter.numel()
        return counts | {"total": sum(p.numel() for p in self.model.parameters())}

    def state(self) -> dict[str, int]:
        """After one step, of one micro-batch."""
        self.model.recompute(RecomputePlan())
        if self.work.num_micro_batches == 1:
            self.optimizer.zero_grad(set_to_none=True)
        self.step(1, self.work.optimizer.fused_backward and self.work.num_micro_batches == 1)
        sizes = {
            "weights": sum(_bytes(each) for each in self.model.parameters()),
            "gradients": self.gradient_bytes(),
            "optimizer state": sum(_bytes(each) for each in self.optimizer.state.values()),
        }
        return sizes | {"total": sum(sizes.values())}

    def gradient_bytes(self) -> int:
        """That are there now."""
        return sum(_bytes(each.grad) for each in self.model.parameters())

    def step(self, num_micro_batches: int, is_fused: bool) -> None:
        """Backward passes that add up, and the update."""
        for number in range(1, num_micro_batches + 1):
            total = self.forward()
            is_last = is_fused and number == num_micro_batches
            with self.fused.updating(total.detach()) if is_last else contextlib.nullcontext():
                total.backward()
        if is_fused:
            self.fused.finish()
        else:
            self.optimizer.step()

    def gradients(self, state: Mapping[str, int]) -> dict[str, int]:
        """What updating inside the backward pass saves, under the run's plan: bytes of gradients by
        hooks, memory by a trace of the step's last micro-batch. ``state``: measured."""
        self.model.recompute(self.work.plan)
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().backward()
        everything = self.gradient_bytes()
        rest = state["weights"] + state["optimizer state"]
        ordinary = rest + self._step_bytes(False)
        with self.held.counting():
            fused = rest + self._step_bytes(True)
        at_once = self.held.most + sum(
            _bytes(tensor.grad) for spec, tensor in self.model.trained().values() if waits(spec)
        )
        return {
            "all, ordinary": everything,
            "at once, fused": at_once,
            "saved": everything - at_once,
            "memory at the peak, ordinary": ordinary,
            "memory at the peak, fused": fused,
        }

    def _step_bytes(self, is_fused: bool) -> int:
        """Of gradients and activations at the fullest moment of a step's last micro-batch."""
        if self.work.num_micro_batches == 1:
            self.optimizer.zero_grad(set_to_none=True)
        there = self.gradient_bytes()  # of the micro-batches before

        def run() -> None:
            with self.model.fixed_weights():
                self.step(1, is_fused)

        return there + peak_bytes(run, self.device) + _bytes(self.tokens)

    def kept(self, plan: RecomputePlan) -> int:
        self.model.recompute(plan)
        with self.autocast(), self.model.fixed_weights():
            return saved_bytes(self.model, self.tokens, self.targets)

    def peak(self, plan: RecomputePlan) -> int:
        """Of a micro-batch whose gradients add to those that are there; tokens included."""
        self.model.recompute(plan)

        def run() -> None:
            with self.model.fixed_weights():
                self.forward().backward()

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

        def run(model: LanguageModel, tokens: Tensor) -> tuple[int, int]:
            with sdpa_kernel(SDPBackend.MATH), self.autocast("cpu"):
                with FlopCounterMode(display=False, custom_mapping=FLOPS) as both:
                    model(tokens, tokens)
                with (
                    FlopCounterMode(display=False, custom_mapping=FLOPS) as blocks,
                    torch.no_grad(),
                ):
                    model.hidden(tokens)
            return blocks.get_total_flops(), both.get_total_flops()

        blocks, both = without_memory(run, self.micro_batch)
        return blocks, both - blocks

    def backward_flops(self, plan: RecomputePlan) -> int:
        """``replay`` and ``invert``, and what packs, look at values, so one and two rows are run;
        FLOPs grow by the same with every row."""
        count = self.micro_batch.sequences
        if plan.policy in ("none", "block") and not plan.is_packed:
            return without_memory(partial(self._backward, plan), self.micro_batch)
        rows = [self._backward(plan, self.model, self.tokens[:n]) for n in (1, 2)]
        return rows[0] + (count - 1) * (rows[-1] - rows[0])

    def _backward(self, plan: RecomputePlan, model: LanguageModel, tokens: Tensor) -> int:
        model.recompute(plan)
        with sdpa_kernel(SDPBackend.MATH):
            with self.autocast(tokens.device.type):
                total, _ = model(tokens, tokens)
            with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
                total.backward()
        return counter.get_total_flops()

    def seconds(self) -> float:
        """Of an optimizer step under the run's own plan."""
        self.model.recompute(self.work.plan)
        times = []
        for _ in range(self.rounds + 1):
            start_s = time.perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            self.step(self.work.num_micro_batches, self.work.optimizer.fused_backward)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start_s)
        return statistics.median(times[1:])


class _Held:
    """Counts the gradients of what is updated inside a backward pass, as they come and go."""

    def __init__(self, parameters: Mapping[str, tuple[TensorSpec, Tensor]]):
        self._tensors = [tensor for spec, tensor in parameters.values() if not waits(spec)]
        self._there: list[Tensor] | None = None
        """None: nobody counts."""
        self.most = 0
        """Bytes that were there at once."""
        for each in self._tensors:
            each.register_post_accumulate_grad_hook(self._arrived)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Meanwhile gradients are counted."""
        self._there, self.most = [each for each in self._tensors if each.grad is not None], 0
        try:
            yield
        finally:
            self._there = None

    def _arrived(self, parameter: Tensor) -> None:
        if self._there is None:
            return
        self._there = [each for each in self._there if each.grad is not None]
        if not any(each is parameter for each in self._there):
            self._there.append(parameter)
        self.most = max(self.most, sum(_bytes(each.grad) for each in self._there))


def product_seconds(work: Workload, device: torch.device) -> dict[str, float]:
    """Seconds of a product of the model's shape in ``fp32`` and in ``bf16`` on this device.

    Some processors have no bf16 product and take hundreds of times longer: on a CPU the shape is
    cut down to a few million FLOPs. The least of four.
    """
    shape = work.spec.shape
    rows, inner, columns = 4096, shape.hidden_size, shape.intermediate_size
    if device.type == "cpu":
        rows, inner, columns = 32, min(inner, 512), min(columns, 512)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left = torch.ones(rows, inner, dtype=dtype, device=device)
        right = torch.ones(inner, columns, dtype=dtype, device=device)
        found[name] = min(_timed(lambda x=left, w=right: x @ w, device) for _ in range(4))
    return found


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    start_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def precision_advice(seconds: Mapping[str, float]) -> str:
    """One sentence on ``product_seconds``."""
    fast, slow = sorted(seconds, key=lambda name: seconds[name])
    times = seconds[slow] / seconds[fast]
    if times < 1.1:
        return "a product takes as long in fp32 as in bf16 here"
    words = {"fp32": "fp32", "bf16": "bf16-mixed (or bf16)"}
    return (
        f"a product in {slow} takes {times:.1f} times as long as in {fast} here: "
        f"--train.precision {words[fast]} is the faster"
    )


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(each) for each in value.values()) if isinstance(value, dict) else 0
