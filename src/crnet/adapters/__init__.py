"""Adapters of PEFT on the package's maps.

    maps     maps as PEFT wraps them, and as a block calls what it made of them
    beside   the adapter of a run: put beside a model, written, read

PEFT, and transformers with it, is imported where an adapter is asked for, and nowhere else.
"""
