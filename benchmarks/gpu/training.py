"""Micro-batches: methods, recomputation, compilation, and the models of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from crnet.config.model_spec import ModelSpec
from crnet.recompute.plan import RecomputePlan
from gpu import models
from gpu.adapters import KERNELS, kernels, predicted_ms
from gpu.bench import Bench, Entry
from gpu.models import LINEARS, MicroBatches, figures, made, measured, sizes
from gpu.plain_llama import PlainLlama

POLICIES = {
    "none": {},
    "block": {"recompute": "block"},
    "replay": {"recompute": "replay"},
    "replay, attention kept": {"recompute": "replay", "recompute_attention": "keep"},
    "invert": {"recompute": "invert"},
}


def eager(bench: Bench) -> Iterator[Entry]:
    """Every size and method without the compiler: torch's own kernels, and fused ones."""
    for size in sizes(bench):
        for mode in KERNELS:
            with kernels(mode):
                # In turn where all three have room at once.
                parts = [(linear,) for linear in LINEARS] if size == "7b" else [LINEARS]
                found = {}
                for part in parts:
                    found |= _methods(bench, size, part, mode)
            yield f"{size}, {mode} kernels", found


def _methods(bench: Bench, size: str, linears: tuple[str, ...], mode: str) -> dict[str, Any]:
    runs = {}
    for linear in linears:
        runs[linear] = (*made(bench, size, linear), RecomputePlan())
    found = measured(bench, runs)
    for linear, (work, _, plan) in runs.items():
        found[linear]["predicted_ms"] = predicted_ms(work, plan, "h100", mode)
    del runs
    bench.free()
    return found


def policies(bench: Bench) -> Iterator[Entry]:
    """What each policy costs CR-Net, and the memory it leaves; one model, its plan changed."""
    for size in ("tiny",) if bench.tiny else ("350m", "7b"):
        work, run = made(bench, size, "crnet")
        for name, train in POLICIES.items():
            plan = models.workload(models.config_of(bench, size, "crnet", **train)).plan
            run.model.recompute(plan)
            timed = bench.sides({name: run})[name]
            memory = {} if "error" in timed else bench.memory(run)
            yield f"{size}, {name}", figures(work, timed | memory, plan)
        del work, run
        bench.free()


def compiled(bench: Bench) -> Iterator[Entry]:
    """Blocks by torch's compiler. 7B at 4 blocks: graphs hang on kinds of block, not on depth.
    Beside the time, how often code was compiled in the warm-up, and after it (0: none anew)."""
    for size in ("tiny",) if bench.tiny else ("130m", "350m", "7b"):
        for linear in ("full", "crnet"):
            work, run = made(bench, size, linear)
            if size == "7b":
                run.model.model.layers = run.model.model.layers[:4]  # type: ignore[assignment]
            # In a dry run graphs are made and run as they are: a CPU's compiler takes minutes.
            run.model.compile_blocks("aot_eager" if bench.tiny else "inductor")
            before = graphs()
            first_s = bench.seconds(run)
            after = graphs()
            timed = bench.sides({linear: run})[linear]
            counts = {"first_s": first_s, "graphs": after - before, "anew": graphs() - after}
            found = figures(work, timed, RecomputePlan()) if size != "7b" else timed
            yield f"{size}, {linear}", found | counts
            del work, run
            torch.compiler.reset()
            bench.free()


def graphs() -> int:
    """Graphs that torch's compiler has made so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def peers(bench: Bench) -> Iterator[Entry]:
    """Full rank by others, beside this package's: the same shapes, tokens and loss."""
    size = "tiny" if bench.tiny else "350m"
    work, ours = made(bench, size, "full")
    makers = {"plain": _plain_llama, "transformers": _transformers}
    if bench.is_gpu:
        makers["transformers with Liger"] = _liger  # last: it changes transformers for good
    for name, make in makers.items():
        try:
            with torch.device(bench.device):
                model = make(work.spec, work.micro_batch.length).to(bench.dtype)
        except ImportError as error:
            yield name, {"error": str(error)}
            continue
        for is_compiled in (False, True):
            if is_compiled and bench.tiny:
                continue  # minutes of a CPU's compiler
            run = _Peer(torch.compile(model) if is_compiled else model, ours)
            timed = bench.sides({name: run, "ours": ours})
            label = f"{name}, compiled" if is_compiled else name
            yield label, {key: figures(work, timed[key], RecomputePlan()) for key in timed}
        del model
        torch.compiler.reset()
        bench.free()


def _plain_llama(spec: ModelSpec, length: int) -> nn.Module:
    return PlainLlama(spec.shape, length)


def _transformers(spec: ModelSpec, length: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = spec.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return _Summed(LlamaForCausalLM(config))


def _liger(spec: ModelSpec, length: int) -> nn.Module:
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        apply_liger_kernel_to_llama,
    )

    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    return _transformers(spec, length)


class _Summed(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = self.model(tokens).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), None


class _Peer:
    """A micro-batch of somebody else's model, on the tokens of ours."""

    def __init__(self, model: Any, ours: MicroBatches):
        self.model, self.ours = model, ours

    def __call__(self) -> None:
        loss, _ = self.model(*self.ours.tokens())
        loss.backward()
