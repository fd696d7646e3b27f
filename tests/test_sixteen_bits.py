"""What a CPU computes in fp32 though the tensors have 16 bits: attention, and parts of the loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crnet.kernels import attention, loss, loss_chunks

SHAPE = (2, 3, 40, 16)  # B, N, T, H
NAMES = ("mixed", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_AMX", False)


def heads(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and what comes back, as a block's views: heads beside each other in memory."""
    generator = torch.Generator().manual_seed(0)
    batch, num, length, size = SHAPE
    return [
        torch.randn(batch, length, num, size, generator=generator).bfloat16().to(dtype)
        .transpose(1, 2).requires_grad_()
        for _ in range(4)
    ]  # fmt: skip


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_gradients(attend, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    *qkv, dy = heads(dtype)
    y = attend(*qkv)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, qkv, dy.detach())), strict=True))


def test_attention_is_as_near_to_the_truth_as_torchs_own() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        truth = with_gradients(by_torch, torch.float64)
    ours, theirs = with_gradients(attention.causal_attention), with_gradients(by_torch)
    for name in NAMES:
        assert ours[name].dtype == torch.bfloat16
        errors = [float((each[name].double() - truth[name]).norm()) for each in (ours, theirs)]
        assert errors[0] <= 1.02 * errors[1], name
        assert errors[0] < 4e-3 * float(truth[name].norm()), name


def test_attention_in_fp32_is_torchs_to_the_bit() -> None:
    ours, theirs = (
        with_gradients(each, torch.float32) for each in (attention.causal_attention, by_torch)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in NAMES)


def kept_bytes(attend) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    *qkv, _ = heads()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = attend(*qkv)
    assert y.requires_grad
    return sum(sizes.values())


def test_attention_keeps_no_more_than_torchs_own() -> None:
    assert kept_bytes(attention.causal_attention) == kept_bytes(by_torch)


def test_another_kernel_that_was_asked_for_is_taken() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        ours, theirs = with_gradients(attention.causal_attention), with_gradients(by_torch)
    assert all(torch.equal(ours[name], theirs[name]) for name in NAMES)


def losses() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(0, 50, (37,), generator=generator)
    target[5] = loss.IGNORED
    value = loss.linear_cross_entropy(x, weight, target, 20)
    value.backward()
    assert x.grad is not None
    assert weight.grad is not None
    scores = loss.target_scores(x, weight, target, 20)
    found = {"loss": value.detach(), "dx": x.grad, "dweight": weight.grad}
    return found | {f"scores {name}": each for name, each in scores._asdict().items()}


@pytest.mark.parametrize("items", [1, 50, 50 * 7])
def test_a_chunks_parts_change_nothing(monkeypatch: pytest.MonkeyPatch, items: int) -> None:
    whole = losses()
    monkeypatch.setattr(loss_chunks, "PART_ITEMS", items)
    parts = losses()
    assert torch.equal(parts["loss"], parts["scores loss_sum"])
    for name, each in whole.items():
        assert torch.equal(parts[name], each), name
