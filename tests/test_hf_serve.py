"""``transformers serve`` answers for a folder of the package, over HTTP, as ``generate`` does.

One server for all of it: a process of its own, started by the line of docs/transformers.md.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import crnet
from crnet.hub.export import export
from crnet.storage import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
PROMPT = "import argparse\n"
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CR-Net to hand on, with the page's chat template beside it."""
    saved = checkpoint.newest(runs[0])
    assert saved is not None
    assert saved.config.model.linear == "crnet"
    out = tmp_path_factory.mktemp("serve") / "served"
    export(saved, out)
    (template,) = re.findall(r"^```jinja\n(.*?)^```", PAGE, re.M | re.S)
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    """An OpenAI client of a server that is up."""
    for package in ("fastapi", "uvicorn", "pydantic", "accelerate"):
        pytest.importorskip(package, reason="the server needs the extra serve")
    openai = pytest.importorskip("openai", reason="the server needs the extra serve")
    (line,) = re.findall(r"^    (transformers serve .*)$", PAGE, re.M)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program, *words = shlex.split(line)
    assert folder.name in words
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / program), *words, "--port", str(port)],
        cwd=folder.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        await_health(port, process)
        yield openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def await_health(port: int, process: subprocess.Popen[str], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> str:
    """What transformers' ``generate`` writes, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        import crnet.hf  # noqa: F401
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=ASKED["max_tokens"], do_sample=False)
    text = tokenizer.decode(found[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(text) > 8
    return text


def test_completions(client: Any, folder: Path, wanted: str, runs: list[Path]) -> None:
    asked = {"model": folder.name, "prompt": PROMPT, **ASKED}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == wanted
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 12)
    pieces = [each.choices[0].text for each in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == wanted
    assert len([each for each in pieces if each]) > 2
    words = {"max_tokens": ASKED["max_tokens"], "greedy": True, "stop_at_end": False}
    assert crnet.generate(runs[0], PROMPT, **words) == wanted


def test_chat_completions(client: Any, folder: Path, wanted: str) -> None:
    """The template of the page is the messages' text and nothing else."""
    messages = [{"role": "system", "content": PROMPT[:6]}, {"role": "user", "content": PROMPT[6:]}]
    asked = {"model": folder.name, "messages": messages, **ASKED}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == wanted
    assert whole.choices[0].message.role == "assistant"
    stream = list(client.chat.completions.create(**asked, stream=True))
    pieces = [each.choices[0].delta.content or "" for each in stream]
    assert "".join(pieces) == wanted
    assert stream[-1].choices[0].finish_reason == "length"


def test_responses(client: Any, folder: Path, wanted: str) -> None:
    asked = {"model": folder.name, "input": PROMPT, "temperature": 0, "max_output_tokens": 12}
    assert client.responses.create(**asked, stream=False).output_text == wanted
    stream = client.responses.create(**asked, stream=True)
    pieces = [each.delta for each in stream if each.type == "response.output_text.delta"]
    assert "".join(pieces) == wanted
