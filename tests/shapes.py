"""Shapes that several test files share."""

from crnet.config.sections import ModelConfig

TINY = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=31,
    rank="4",
)
