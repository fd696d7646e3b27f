"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for Hopper (sm_90) with
the assembler that Triton brings. Needs Triton: the extra ``gpu-kernels``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="no Triton here: pip install -e '.[gpu-kernels]'",
)

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """Against fp64 with all gradients, under replay and invert, traced, and on shapes alone."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", TESTS / "triton_interpreted.py"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed|\[100%\]", done.stdout, re.M), done.stdout


def compiled_for_hopper(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Any:
    """A kernel compiled for sm_90, its pointers and sizes multiples of 16 where ``types`` has a
    ``!`` behind them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from crnet.kernels.triton_carried import NUM_STAGES, NUM_WARPS

    signature = {name: kind.rstrip("!") for name, kind in types.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (idx,): [["tt.divisibility", 16]]
        for idx, name in enumerate(kernel.arg_names)
        if types.get(name, "").endswith("!")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def assembled(ptx: str, folder: Path) -> dict[str, int]:
    """Registers a thread and bytes spilled, as the assembler counts them."""
    import triton

    path = folder / "kernel.ptx"
    path.write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    done = subprocess.run(
        [assembler, "-v", "-arch=sm_90a", "-o", folder / "kernel.cubin", path],
        capture_output=True,
        text=True,
        check=True,
    )
    counts = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert counts, done.stderr
    assert registers, done.stderr
    return {"registers": int(registers[1]), "spilled": int(counts[1]) + int(counts[2])}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "rank", "width", "carry"),
    [
        (65536, 192, 768, "bf16"),
        (32768, 224, 2736, "bf16"),
        (32768, 224, 2736, "fp32"),
        (4096, 1024, 11008, "bf16"),
        (4096, 1024, 11008, "fp32"),
        (64, 256, 1024, "bf16"),
        (1, 256, 1024, "bf16"),
        (16384, 100, 5461, "bf16"),
        (16384, 100, 5461, "fp32"),
    ],
)
def test_the_map_on_hopper(num_rows: int, rank: int, width: int, carry: str, tmp_path: Path):
    """Hopper's matrix instruction where a tile has 64 rows, nothing spilled; in aligned rows the
    next tiles of Z and B are under way while one is multiplied."""
    from crnet.kernels.triton_carried import carried_up_kernel, tiles

    aligned = "!" if rank % 16 == 0 and width % 16 == 0 else ""
    types = {"z": "*bf16!", "b": "*bf16!", "carry": f"*{carry}!", "gain": "*fp32"}
    types |= {"y": f"*{carry}!", "num_rows": "i32", "width": f"i32{aligned}"}
    types |= {"z_stride": f"i32{aligned}", "b_stride": f"i32{aligned}"}
    constants = {"rank": rank, **tiles(num_rows, rank, width), "upcast": False}
    ptx = compiled_for_hopper(carried_up_kernel, types, constants).asm["ptx"]
    counts = assembled(ptx, tmp_path)
    assert counts["spilled"] == 0
    assert counts["registers"] <= 255
    assert ("wgmma.mma_async" in ptx) == (num_rows >= 64)
    assert ("mma.sync" in ptx) == (num_rows < 64)
    assert ("cp.async" in ptx) == bool(aligned)
    if aligned:  # two programs on a processor of 65,536 registers: 8 warps of 32 each
        assert counts["registers"] <= (128 if carry == "bf16" else 192)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_backward_of_a_carry_on_hopper(dtype: str, tmp_path: Path):
    """Loads and stores of 16 bytes, nothing spilled, no atomic: the order of a sum is fixed."""
    from crnet.kernels import triton_carried

    pointer = f"*{dtype}!"
    types = {"dy": pointer, "carry": pointer, "gain": "*fp32", "dcarry": pointer}
    types |= {"sums": "*fp32", "num_items": "i32!"}
    constants = {"items": triton_carried.ITEMS_A_PROGRAM, "tile": triton_carried.TILE_ITEMS}
    kernel = triton_carried.carry_gradients_kernel
    ptx = compiled_for_hopper(kernel, types, constants).asm["ptx"]
    counts = assembled(ptx, tmp_path)
    assert counts["spilled"] == 0
    assert counts["registers"] <= 64
    assert "atom." not in ptx
    assert not re.search(r"\bred\.", ptx)
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx


def test_tiles_are_a_function_of_the_shape():
    from crnet.kernels.triton_carried import tiles

    assert tiles(65536, 224, 2736) == {"tile_rows": 128, "tile_width": 128, "tile_rank": 32}
    assert tiles(4096, 1024, 11008) == {"tile_rows": 128, "tile_width": 128, "tile_rank": 64}
    assert tiles(3, 100, 50) == {"tile_rows": 16, "tile_width": 64, "tile_rank": 32}
