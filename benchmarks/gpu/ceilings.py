"""What the card can do at all, product by product; and the head's loss by chunk size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from crnet.kernels.loss import linear_cross_entropy
from gpu.adapters import loss_chunk
from gpu.bench import Bench, Entry

PRODUCTS = {  # (M, K, N) of x W: the shapes of 1B, 350M and 7B
    "1b gate, f 5461": (16_384, 2048, 5461),
    "1b gate, f 5504": (16_384, 2048, 5504),
    "1b down, f 5461": (16_384, 5461, 2048),
    "1b down, f 5504": (16_384, 5504, 2048),
    "1b B of gate, f 5461": (16_384, 448, 5461),
    "1b B of gate, f 5504": (16_384, 448, 5504),
    "1b dA of down, f 5461": (5461, 16_384, 448),
    "1b dA of down, f 5504": (5504, 16_384, 448),
    "1b A of q": (16_384, 2048, 448),
    "1b A of q, k, v at once": (16_384, 2048, 1344),
    "350m A of q": (32_768, 1024, 256),
    "350m B of q": (32_768, 256, 1024),
    "350m dB of q": (256, 32_768, 1024),
    "7b A of q": (4096, 4096, 896),
    "7b B of gate": (4096, 896, 11_008),
    "7b dense gate": (4096, 4096, 11_008),
}


def ceilings(bench: Bench) -> Iterator[Entry]:
    """Copy, a large product, every product of the models, forms of a sum, attention."""
    count = 1 << (18 if bench.tiny else 29)
    yield "copy", _copy(bench, count)
    size = 64 if bench.tiny else 8192
    yield "product 8192", _products(bench, {"": (size, size, size)})[""]
    shapes = {"tiny": (32, 45, 16)} if bench.tiny else PRODUCTS
    yield "products", _products(bench, shapes)
    yield "gain * carry + z b", bench.sides(_sums(bench))
    yield "attention", bench.sides(_attention(bench))


def _copy(bench: Bench, num_items: int) -> dict[str, Any]:
    source, target = (
        torch.empty(num_items, dtype=bench.dtype, device=bench.device) for _ in range(2)
    )
    timed = bench.sides({"copy": lambda: target.copy_(source)})["copy"]
    moved = 2 * source.numel() * source.element_size()
    return timed | {"bytes_per_s": moved / (timed["ms"] / 1e3)}


def _products(bench: Bench, shapes: dict[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Each with operands of its own, as a model has them: rows of odd widths are not aligned."""

    def product(m: int, k: int, n: int) -> Callable[[], Tensor]:
        left, right = bench.randn(m, k), bench.randn(k, n)
        return lambda: left @ right

    timed = bench.sides({name: product(*shape) for name, shape in shapes.items()})
    for name, (m, k, n) in shapes.items():
        if "ms" in timed[name]:
            timed[name]["flops_per_s"] = 2 * m * k * n / (timed[name]["ms"] / 1e3)
    return timed


def _sums(bench: Bench) -> dict[str, Callable[[], Tensor]]:
    """Ways to write ``gain * carry + z b`` of 350M's map ``gate``."""
    m, r, f = (32, 8, 48) if bench.tiny else (32_768, 256, 2736)
    z, b, carry, gain = bench.randn(m, r), bench.randn(r, f), bench.randn(m, f), bench.randn(1)

    def in_place() -> Tensor:
        y = carry * gain
        return torch.addmm(y, z, b, out=y)

    return {
        "z b alone": lambda: z @ b,
        "gain * carry + z @ b": lambda: gain * carry + z @ b,
        "mul, addmm(out=)": in_place,
        "addmm(beta=number)": lambda: torch.addmm(carry, z, b, beta=0.5),
        "addcmul(z @ b)": lambda: torch.addcmul(z @ b, carry, gain),
    }


def _attention(bench: Bench) -> dict[str, Callable[[], object]]:
    """Forward and backward of 350M's attention by each of torch's kernels."""
    batch, heads, length, size = (2, 2, 16, 16) if bench.tiny else (128, 16, 256, 64)
    operands = [bench.randn(batch, heads, length, size).requires_grad_() for _ in range(3)]
    dy = torch.randn_like(operands[0])

    def run(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            mixed = functional.scaled_dot_product_attention(*operands, is_causal=True)
        torch.autograd.grad(mixed, operands, dy)

    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    backends = {name: getattr(SDPBackend, name) for name in names if hasattr(SDPBackend, name)}
    return {name: (lambda each=backend: run(each)) for name, backend in backends.items()}


def loss_chunks(bench: Bench) -> Iterator[Entry]:
    """The head and its loss, forward and backward, by how many logits exist at once; beside it the
    three products alone, and other implementations."""
    shapes = {"tiny": (64, 32, 96)} if bench.tiny else LOSSES
    exponents = (10, 12) if bench.tiny else (23, 25, 26, 27, 28, 29)
    for size, (rows, width, vocab_size) in shapes.items():
        x = bench.randn(rows, width).requires_grad_()
        weight = (0.02 * bench.randn(vocab_size, width)).requires_grad_()
        targets = torch.randint(0, vocab_size, (rows,), device=bench.device)

        def chunked(exponent: int, x=x, weight=weight, targets=targets) -> None:
            with loss_chunk(1 << exponent):
                rows_at_once = max(1, (1 << exponent) // weight.shape[0])
                linear_cross_entropy(x, weight, targets, rows_at_once).backward()

        def plain(x=x, weight=weight, targets=targets) -> None:
            logits = (x @ weight.T).float()
            functional.cross_entropy(logits, targets, reduction="sum").backward()

        def products(x=x, weight=weight) -> None:
            for _ in range(3):  # logits, dx and dW: equally many FLOPs
                x.detach() @ weight.detach().T

        runs = {f"2^{e}": (lambda e=e, run=chunked: run(e)) for e in exponents}
        runs |= {"plain": plain, "products": products, **_liger(x, weight, targets)}
        yield size, bench.sides(runs)


LOSSES = {"350m": (32_768, 1024, 32_000), "7b": (4096, 4096, 32_000)}


def _liger(x: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    """Liger's fused head and loss, where it is installed and there is a GPU."""
    try:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError:
        return {}
    module = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return {"liger": lambda: module(weight, x, targets).backward()}
