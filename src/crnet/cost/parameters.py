"""Parameters by term, in closed form."""

from __future__ import annotations

from crnet.config.model_spec import ModelSpec
from crnet.specs import Role

TERMS: dict[Role, str] = {
    "embedding": "embedding",
    "head": "head",
    "router": "router",
    "norm": "norms",
    "gain": "gains",
    "bias": "biases",
}
"""Of the roles that are counted by themselves; the others count for their position."""
ACTIVE = "active of them"
"""The term of ``active_parameters``, of a model with experts."""


def terms(spec: ModelSpec) -> dict[str, str]:
    """The term of every tensor, by its full name."""
    found = {name: TERMS.get(tensor.role, "other") for name, tensor in spec.tensors.items()}
    for slot in spec.slots[0]:
        for name, tensor in spec.shared_tensors(slot).items():
            full = f"{spec.shared_name(slot.position)}.{name}"
            found[full] = TERMS.get(tensor.role, slot.position)
    for block in spec.slots:
        for slot in block:
            prefix = spec.map_name(slot)
            for name, tensor in spec.map_tensors(slot).items():
                found[f"{prefix}.{name}"] = TERMS.get(tensor.role, slot.kind)
            if spec.adapter is not None:
                found |= {f"{prefix}.{name}": "adapter" for name in spec.adapter.tensors(slot)}
    return found


def num_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters by term and their ``total``: ``embedding``, ``head``, ``norms``, each position,
    and where there are any ``gains``, ``biases``, ``router`` and ``adapter``; of experts also
    ``active of them``: those that a token goes through. Cost: no tensor is made."""
    counts = dict.fromkeys(("embedding", "head", "norms"), 0)
    counts |= {position.kind: 0 for position in spec.positions if not position.is_operator}
    for name, term in terms(spec).items():
        counts[term] = counts.get(term, 0) + spec.tensors[name].num_items
    counts |= {"total": sum(counts.values())}
    if any(position.expert for position in spec.positions):
        counts[ACTIVE] = active_parameters(spec)
    return counts


def active_parameters(spec: ModelSpec) -> int:
    """Those that one token goes through: all, and of experts as many as it takes."""
    idle = 0
    for slot in (slot for block in spec.slots for slot in block if slot.expert):
        if slot.expert is not None and slot.expert.idx >= slot.expert.active:  # all are equal
            idle += sum(tensor.num_items for tensor in spec.map_tensors(slot).values())
    return sum(tensor.num_items for tensor in spec.tensors.values()) - idle
