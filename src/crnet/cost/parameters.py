"""Parameters by term, in closed form."""

from __future__ import annotations

from crnet.config.model_spec import ModelSpec
from crnet.specs import Role

TERMS: dict[Role, str] = {
    "embedding": "embedding",
    "head": "head",
    "norm": "norms",
    "gain": "gains",
    "bias": "biases",
}
"""Of the roles that are counted by themselves; the others count for their position."""


def terms(spec: ModelSpec) -> dict[str, str]:
    """The term of every tensor, by its full name."""
    found = {name: TERMS.get(tensor.role, "other") for name, tensor in spec.tensors.items()}
    for block in spec.slots:
        for slot in block:
            prefix = spec.map_name(slot)
            for name, tensor in spec.map_tensors(slot).items():
                found[f"{prefix}.{name}"] = TERMS.get(tensor.role, slot.position)
    return found


def num_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters by term and their ``total``: ``embedding``, ``head``, ``norms``, each position,
    and where there are any ``gains`` and ``biases``. Cost: no tensor is made."""
    counts = dict.fromkeys(("embedding", "head", "norms"), 0)
    counts |= {position.name: 0 for position in spec.positions}
    for name, term in terms(spec).items():
        counts[term] = counts.get(term, 0) + spec.tensors[name].num_items
    return counts | {"total": sum(counts.values())}
