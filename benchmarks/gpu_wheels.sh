#!/usr/bin/env bash
# Download what benchmarks/gpu_suite.py needs on a machine that reaches no package index and has
# torch, transformers and pytest: pure Python wheels, into .whl/ (git-ignored).
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .whl
"${PYTHON:-python3}" -m pip download --quiet --only-binary :all: --no-deps --dest .whl \
  'cyclopts>=5.4,<6' docstring_parser rich_rst liger_kernel
ls -l .whl
