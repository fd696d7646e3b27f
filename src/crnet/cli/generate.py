"""``crnet generate``."""

from __future__ import annotations

import os
import time
from typing import Annotated

from cyclopts import Parameter

from crnet.cli.arguments import CheckpointPath, Command, Device, Json, print_json
from crnet.errors import ConfigError
from crnet.inference.sampling import Sampling, check_sampling


def generate(
    checkpoint: CheckpointPath,
    /,
    *,
    prompt: str = "",
    chat: str | None = None,
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text, or answer a question.

    Parameters
    ----------
    prompt
        The text to continue.
    chat
        What a user asks, in the place of a prompt: answered by the chat template that the model
        was trained with, until the turn ends.
    """
    check_sampling(sampling)
    if chat is not None and prompt:
        raise ConfigError("--chat takes the place of --prompt; leave one of them out")

    from crnet.inference import generate as generation
    from crnet.inference.load import load_model, load_tokenizer, pick_device
    from crnet.storage.checkpoint import resolve

    saved = resolve(checkpoint)
    model = load_model(saved, pick_device(device))
    asked = {"prompt": _as_given(prompt)} if chat is None else {"chat": _as_given(chat)}
    prompt = asked.get("prompt", "")
    given = prompt if chat is None else [{"role": "user", "content": asked["chat"]}]
    pieces = generation.complete(model, load_tokenizer(saved), given, sampling)  # checks it
    if not as_json:
        print(prompt, end="", flush=True)
    start_s = time.perf_counter()
    text = ""
    for piece in pieces:
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    if not as_json:
        print()
        return
    elapsed_s = time.perf_counter() - start_s
    print_json({**asked, "text": text, "elapsed_s": elapsed_s})


def _as_given(prompt: str) -> str:
    """The prompt where the locale knows no UTF-8, but the words of the command line are in it."""
    try:
        return os.fsencode(prompt).decode()
    except UnicodeError:  # it is said where the prompt is encoded
        return prompt


COMMAND = Command(generate)
