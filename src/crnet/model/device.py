"""What a run sets on the device that it computes on."""

from __future__ import annotations

import dataclasses
import sys

import torch

from crnet.config.sections import RunConfig, precision_of


def with_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """The run with the precision that ``auto`` stands for on a device."""
    precision = precision_of(config.train, device.type)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def prepare_device(config: RunConfig, device: torch.device) -> None:
    """Set torch's switches for the process, on a GPU; warn of a CPU that is slow in bf16.

    On a GPU products of fp32 are computed in TF32 where ``train.tf32`` says so (10 bits of the
    factors, sums in fp32), and sums of bf16 products are never split in bf16. On a CPU nothing is
    set.

    Args:
        config: with its precision resolved.
    """
    if device.type == "cuda":
        # Not the switches by backend: torch refuses to read its older ones, as its compiler does,
        # once they are set.
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif config.train.precision != "fp32" and not has_fast_bf16():
        print(
            f"--train.precision {config.train.precision}: this CPU has no bf16 products and is up "
            "to 250 times slower than in fp32; say --train.precision fp32",
            file=sys.stderr,
        )


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 numbers itself (AVX-512 BF16, AMX or alike)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
