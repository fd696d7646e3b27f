"""How many rows of logits the loss holds at once. No torch: the cost model reads it too."""

CPU_ROWS = 256
"""Fastest where measured, at vocabularies of 4,096 and 32,000: products still large, a chunk's
logits still near the cache (docs/performance.md)."""
CPU_ITEMS = 1 << 23
"""32 MiB of fp32."""
CUDA_ITEMS = 1 << 28
"""1 GiB of fp32. The weights' gradient is read and written once a chunk: few, large chunks."""

PART_ITEMS = 1 << 20
"""Of a 16-bit chunk, on a CPU, what is widened to fp32 at once: 4 MiB, which its cache holds.
Measured at a vocabulary of 32,000 and width 768: the softmax takes a quarter of the time that it
takes whole, the sum of products a tenth of what it took beside the product."""


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows of a chunk on a kind of device (``cpu``, ``cuda``); at least 1."""
    if device_type == "cpu":
        return max(1, min(CPU_ROWS, CPU_ITEMS // vocab_size))
    return max(1, CUDA_ITEMS // vocab_size)
