"""Fused operations. ``naive.py`` is the specification; every other file is judged against it."""
