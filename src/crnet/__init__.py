"""Pre-training language models with cross-layer low-rank structure (CR-Net, arXiv:2509.18993)."""

__version__ = "0.1.0"
