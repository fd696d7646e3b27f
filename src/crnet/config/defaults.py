"""The methods of a user who names none, and those that others are compared with."""

from __future__ import annotations

from typing import Literal

ARCHITECTURE = "llama"
LINEAR = "crnet"
STREAM = "residual"
OPTIMIZER = "adamw"
SCHEDULE = "cosine"

BASELINES = ("full", "lowrank")
"""Parameterizations that a plan is shown beside."""

AdapterName = Literal["lora"]
"""PEFT's adapters that training knows."""
