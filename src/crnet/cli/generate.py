"""``crnet generate``."""

from __future__ import annotations

import time
from typing import Annotated

from cyclopts import Parameter

from crnet.cli.arguments import CheckpointPath, Command, Device, Json, print_json
from crnet.inference.sampling import Sampling, check_sampling


def generate(
    checkpoint: CheckpointPath,
    /,
    *,
    prompt: str = "",
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text.

    Parameters
    ----------
    prompt
        The text to continue.
    """
    check_sampling(sampling)

    from crnet.inference import generate as generation
    from crnet.inference.load import load_model, load_tokenizer, pick_device
    from crnet.storage.checkpoint import resolve

    saved = resolve(checkpoint)
    model = load_model(saved, pick_device(device))
    if not as_json:
        print(prompt, end="", flush=True)
    start_s = time.perf_counter()
    text = ""
    for piece in generation.complete(model, load_tokenizer(saved), prompt, sampling):
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    if not as_json:
        print()
        return
    elapsed_s = time.perf_counter() - start_s
    print_json({"prompt": prompt, "text": text, "elapsed_s": elapsed_s})


COMMAND = Command(generate)
