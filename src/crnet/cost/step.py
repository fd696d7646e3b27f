"""FLOPs and memory of a whole optimizer step."""

from __future__ import annotations

from crnet.cost.flops import block_flops
from crnet.cost.peak import peak_bytes
from crnet.cost.workload import Workload
from crnet.optimizers._fused_backward import waits
from crnet.recompute.plan import RecomputePlan


def step_flops(work: Workload, plan: RecomputePlan) -> dict[str, int]:
    """FLOPs of one optimizer step, all micro-batches: products, 2 a multiply-add.

    ``attention`` is a part of the blocks and counts every pair of tokens, as torch's counter does
    and the paper's eq. 10; ``attention if causal`` is what a kernel that skips masked pairs needs.
    """
    micro_batch, shape = work.micro_batch, work.spec.shape
    counts = block_flops(micro_batch, plan)
    blocks = {key: work.num_micro_batches * count for key, count in counts.items()}
    rows = work.num_micro_batches * micro_batch.rows
    head = 2 * rows * shape.hidden_size * shape.vocab_size
    inside = micro_batch.inside
    mixing = work.spec.num_layers * (inside.forward_flops - inside.routing_flops)  # forward
    mixing *= work.num_micro_batches
    window = work.spec.architecture.window(work.spec.architecture_options)
    seen = attended(micro_batch.length, window)
    parts = {
        "blocks forward": blocks["forward"],
        "blocks backward": blocks["backward"],
        "recomputation": blocks["recompute"],
        "head forward": head,
        "head backward": 2 * head,
    }
    return parts | {
        "total": sum(parts.values()),
        "attention": 3 * mixing,
        "attention if causal": 3 * mixing * seen // micro_batch.length**2,
    }


def attended(length: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to, itself among them, in a row."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def step_memory(work: Workload, plan: RecomputePlan | None = None) -> int:
    """Weights, gradients, optimizer state, and the most that activations take beside them.

    Gradients that are not freed within the backward pass are taken to be there when it begins, as
    in every micro-batch but a step's first. ``plan``: None: the run's own.
    """
    return sum(work.state_bytes.values()) + peak_bytes(work.micro_batch, plan or work.plan)


def memory_in_turn(work: Workload) -> int:
    """As ``step_memory``, of a step of one micro-batch: gradients come as activations go, and where
    the update is fused with the backward pass most of them go at once."""
    is_fused = work.optimizer.fused_backward
    by_block = [0] * (work.spec.num_layers + 1)  # what is above the blocks comes first
    for name, tensor in work.spec.tensors.items():
        size = 0 if is_fused and not waits(tensor) else work.bytes_of_gradients([tensor])
        if name.startswith("model.layers."):
            by_block[int(name.split(".")[2])] += size
        elif name == "lm_head.weight":
            by_block[-1] += size
    coming = [sum(by_block[idx + 1 :]) for idx in range(work.spec.num_layers)]
    peak, states = peak_bytes(work.micro_batch, work.plan, coming=coming), work.state_bytes
    at_the_end = work.gradients_at_once if is_fused else work.gradient_bytes
    held = states["weights"] + states["optimizer state"]
    return held + max(peak, at_the_end + work.micro_batch.stream_size)
