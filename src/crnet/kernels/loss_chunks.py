"""How many logits the chunked loss holds at once. No torch: the cost model reads it too."""

LOSS_CHUNK_ITEMS = 1 << 23
"""32 MiB of fp32."""
