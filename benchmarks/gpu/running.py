"""A model that is used: decoding and evaluation; and where the time of a micro-batch goes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from crnet.inference.evaluate import TOKENS_AT_ONCE
from crnet.inference.generate import generate
from crnet.inference.sampling import Sampling
from gpu import models
from gpu.adapters import KERNELS, kernels
from gpu.bench import Bench, Entry, spread
from gpu.models import drawn, made


def decode(bench: Bench) -> Iterator[Entry]:
    """Tokens a second after a prompt, greedy and drawn; and fp32 evaluation."""
    num_tokens = 4 if bench.tiny else 64
    for size in ("tiny",) if bench.tiny else ("350m", "7b"):
        for linear in ("full", "crnet"):
            work = models.workload(models.config_of(bench, size, linear))
            model = drawn(bench, work)
            prompt = list(range(1, 9 if bench.tiny else 65))
            found: dict[str, Any] = {}
            for name, sampling in _samplings(num_tokens).items():
                rates = [_rate(bench, model, prompt, sampling) for _ in range(3)]
                found[name] = {"tokens_per_s": max(rates), "all": rates}
            yield f"{size}, {linear}", found
            del model
            bench.free()
    size = "tiny" if bench.tiny else "1b"
    yield f"{size}, evaluation", _evaluation(bench, size)


def _samplings(num_tokens: int) -> dict[str, Sampling]:
    plain = Sampling(max_tokens=num_tokens, stop_at_end=False)
    return {
        "greedy": dataclasses.replace(plain, greedy=True),
        "top-k": dataclasses.replace(plain, top_k=50),
        "top-p": dataclasses.replace(plain, top_p=0.9),
    }


def _rate(bench: Bench, model: Any, prompt: list[int], sampling: Sampling) -> float:
    """Tokens a second after the first, which is the prompt's."""
    tokens = generate(model, prompt, sampling, 0)
    next(tokens)
    bench.synchronize()
    start_s = time.perf_counter()
    count = sum(1 for _ in tokens)
    bench.synchronize()
    return count / (time.perf_counter() - start_s)


def _evaluation(bench: Bench, size: str) -> dict[str, Any]:
    """Forward passes of evaluation's size in fp32, and what 10M tokens would take."""
    found = {}
    for linear in ("full", "crnet"):
        work = models.workload(models.config_of(bench, size, linear))
        sequences = 2 if bench.tiny else TOKENS_AT_ONCE // work.micro_batch.length
        work = dataclasses.replace(
            work, micro_batch=dataclasses.replace(work.micro_batch, sequences=sequences)
        )
        run = models.MicroBatches(bench, work, drawn(bench, work, torch.float32))
        times_s = [bench.seconds(run.forward) for _ in range(1 + 3)][1:]
        timed = spread(times_s)
        found[linear] = timed | {
            "s_of_10M_tokens": timed["ms"] / 1e3 / work.micro_batch.rows * 1e7,
        }
        del run
        bench.free()
    return found


def top_kernels(bench: Bench) -> Iterator[Entry]:
    """The 40 kernels that take longest in a micro-batch of CR-Net, how many run a block, and the
    share of the time in which none does."""
    size = "tiny" if bench.tiny else "350m"
    for mode in KERNELS:
        with kernels(mode):
            work, run = made(bench, size, "crnet")
            yield f"{size}, {mode} kernels", _profiled(bench, run, work.spec.num_layers)
            del work, run
            bench.free()


def _profiled(bench: Bench, run: Any, num_layers: int) -> dict[str, Any]:
    elapsed_s = statistics.median(bench.seconds(run) for _ in range(5))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_gpu else [])]
    with profile(activities=activities) as profiled:
        run()
        bench.synchronize()
    rows = []
    for each in profiled.key_averages():
        on_device = each.self_device_time_total if bench.is_gpu else each.self_cpu_time_total
        is_kernel = not bench.is_gpu or each.device_type == torch.autograd.DeviceType.CUDA
        if on_device and is_kernel:
            rows.append({"name": each.key[:120], "count": each.count, "us": round(on_device, 1)})
    rows.sort(key=lambda row: -row["us"])
    total, busy_s = sum(row["count"] for row in rows), sum(row["us"] for row in rows) / 1e6
    return {
        "ms": 1e3 * elapsed_s,
        "kernels_a_block": total / num_layers,
        "idle_frac": max(0.0, 1 - busy_s / elapsed_s),
        "kernels": rows[:40],
    }
