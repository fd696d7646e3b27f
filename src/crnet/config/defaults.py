"""The methods of a user who names none, and those that others are compared with."""

ARCHITECTURE = "llama"
LINEAR = "crnet"
STREAM = "residual"
OPTIMIZER = "adamw"
SCHEDULE = "cosine"

BASELINES = ("full", "lowrank")
"""Parameterizations that a plan is shown beside."""
