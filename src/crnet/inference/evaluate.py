"""Token-weighted loss over a fixed, hashed validation set, in fp32 unless told otherwise.

Beside it the same sum by byte of the text, which compares models whatever their tokenizers, and how
often the next token is the likeliest one.

The figures depend on the weights and the set alone: which rows it has, and their order, are fixed
(``data.rows.Rows.within``); they are read in batches whose size is fixed here (so the training
micro-batch cannot change even the last bit), losses are summed in fp64 and divided by the number of
target tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crnet.data.rows import IGNORED, Rows, validation_batches
from crnet.model.language_model import LanguageModel
from crnet.parallel.engine import Engine
from crnet.parallel.world import ALONE, World

TOKENS_AT_ONCE = 8192
"""Input tokens in one forward pass of an evaluation."""

Sums = Callable[[Tensor, Tensor], Tensor]

Precision = Literal["fp32", "tf32", "bf16"]
"""Of products: fp32; tf32: fp32 with the mantissas of products cut to 10 bits, on GPUs that have
it; bf16: products in bf16 (autocast), norms, softmax and sums in fp32."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    loss: float
    """Mean over target tokens, nats."""
    tokens: int
    """Target tokens."""
    accuracy: float = math.nan
    """Share of the targets that are the likeliest token (of several, the lowest id)."""
    bytes: int = 0
    """Of the text that the targets stand for (``data.rows.Rows.num_bytes``); 0: not known."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The whole loss, in bits, over the bytes of the text; nan where these are not known."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def figures(self) -> dict[str, Any]:
        """As ``metrics.jsonl`` and ``--json`` have them."""
        return {
            "val_loss": self.loss,
            "val_perplexity": self.perplexity,
            "val_bits_per_byte": self.bits_per_byte,
            "val_accuracy": self.accuracy,
            "val_tokens": self.tokens,
            "val_bytes": self.bytes,
        }

    def words(self) -> str:
        """The figures that compare, in words."""
        return (
            f"perplexity {self.perplexity:.2f}, {self.bits_per_byte:.4f} bits a byte, "
            f"accuracy {self.accuracy:.2%}"
        )


def evaluation_of(row: Mapping[str, Any]) -> Evaluation:
    """Inverse of ``Evaluation.figures``; of a row that knows less, what it knows."""
    accuracy, bytes_ = row.get("val_accuracy", math.nan), row.get("val_bytes", 0)
    return Evaluation(row["val_loss"], row["val_tokens"], accuracy, bytes_)


def exp(loss: float) -> float:
    """e to a loss; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(model: LanguageModel, rows: Rows, max_tokens: int) -> Evaluation:
    """Evaluate a model in fp32. Arguments, errors and cost: ``evaluate_unless``."""
    found = evaluate_unless(lambda: False, model, rows, max_tokens)
    assert found is not None
    return found


def evaluate_unless(
    stopped: Callable[[], bool],
    model: LanguageModel,
    rows: Rows,
    max_tokens: int,
    precision: Precision = "fp32",
    world: World = ALONE,
    sums: Sums | None = None,
) -> Evaluation | None:
    """Evaluate a model, or give up and return None as soon as ``stopped()`` says so.

    Args:
        stopped: asked before every batch.
        model: on any device. Weights narrower than fp32 are read as fp32 (``widened``), unless
            products are in bf16.
        rows: rows of the validation split.
        max_tokens: most input tokens read.
        precision: of products.
        world: the processes that share the rows; each gets the same figure.
        sums: computes the summed loss and how many targets are the likeliest token, where several
            processes have parts of the model (``parallel.engine.Engine.sums``); None: one does.
    Raises:
        ConfigError: the split holds no row.
    Cost: one forward pass, saving nothing; memory for the logits of a chunk of rows, and what
        ``widened`` takes. The host waits for the device once, at the end. Compiled blocks run as
        written: they are not compiled once more for these shapes.
    """
    device, sums = next(model.parameters()).device, sums or Engine(model).sums
    was_training = model.training
    model.eval()
    batch_size = max(1, TOKENS_AT_ONCE // rows.sequence_length)
    found = torch.zeros(2, dtype=torch.float64, device=device)
    num_tokens = torch.zeros((), dtype=torch.int64)
    complete = True
    try:
        with computing(model, device, precision):
            for tokens, targets in _share(validation_batches(rows, batch_size, max_tokens), world):
                if stopped():
                    complete = False
                    break
                found += sums(tokens.to(device), targets.to(device))
                num_tokens += (targets != IGNORED).sum()
    finally:
        model.train(was_training)
    if not complete:
        return None
    loss_sum, num_right = world.sum(found).tolist()
    tokens = int(world.sum(num_tokens.to(device)).item())
    num_bytes = rows.num_bytes(rows.within(max_tokens))
    return Evaluation(loss_sum / tokens, tokens, num_right / tokens, num_bytes)


def _share(
    batches: Iterable[tuple[Tensor, Tensor]], world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches: as many on every process, the last perhaps without a target."""
    idx, count = world.share
    batches = iter(batches)
    while group := list(itertools.islice(batches, count)):
        tokens, targets = group[min(idx, len(group) - 1)]
        yield tokens, targets if idx < len(group) else torch.full_like(targets, IGNORED)


@contextlib.contextmanager
def computing(model: LanguageModel, device: torch.device, precision: Precision) -> Iterator[None]:
    """Without gradients and as written, in a precision."""
    bf16 = precision == "bf16"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if any(block._compiled_call_impl is not None for block in model.model.blocks()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16))
        if not bf16:
            stack.enter_context(widened(model))
        if device.type == "cuda":
            stack.enter_context(_fp32_products("tf32" if precision == "tf32" else "ieee"))
        yield


@contextlib.contextmanager
def _fp32_products(kind: str) -> Iterator[None]:
    """Meanwhile products of fp32 on a GPU are ``tf32`` or ``ieee``, whatever the run has set."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, kind
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def widened(model: LanguageModel) -> Iterator[None]:
    """Meanwhile, weights narrower than fp32 are fp32: a block's while the block runs, all others
    throughout. The parameters themselves are not touched and come back.

    Cost: a second copy in fp32 of embedding, head and one block; a cast of every block a forward
    pass. Numerics: those of a model cast to fp32 whole, bit for bit.
    """
    blocks = model.model.blocks()
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    with contextlib.ExitStack() as stack:
        stack.callback(_widen(outside))
        for block in blocks:
            if _narrow(list(block.modules())):
                _widen_while_running(block, stack)
        yield


def _widen_while_running(block: nn.Module, stack: contextlib.ExitStack) -> None:
    """Hook a block for as long as ``stack`` is open."""
    narrow: list[Callable[[], None]] = []

    def before(*_: Any) -> None:
        narrow.append(_widen(list(block.modules())))

    def after(*_: Any) -> None:
        if narrow:  # not where the hook before failed
            narrow.pop()()

    stack.callback(block.register_forward_pre_hook(before).remove)
    stack.callback(block.register_forward_hook(after, always_call=True).remove)


def _narrow(modules: list[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, parameter) of those in fewer bits than fp32 has."""
    return [
        (module, name, parameter)
        for module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dtype in (torch.bfloat16, torch.float16)
    ]


def _widen(modules: list[nn.Module]) -> Callable[[], None]:
    """Put fp32 copies in the place of narrow parameters; returns what puts these back. One that
    several modules share is copied once."""
    found = _narrow(modules)
    wide = {id(each): nn.Parameter(each.detach().float(), False) for _, _, each in found}
    for module, name, parameter in found:
        module._parameters[name] = wide[id(parameter)]

    def put_back() -> None:
        for module, name, parameter in found:
            module._parameters[name] = parameter

    return put_back
