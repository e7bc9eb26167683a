#!/usr/bin/env bash
# From nothing but Python and pip to a real model that answers: install, export SmolLM2-135M-Instruct to ONNX,
# prove it equal to PyTorch, ask it something.   scripts/quickstart.sh ["your question"]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
setup_environment ort
"$BIN/gqa-export" demo "${1:-What is the capital of France?}" -o "$ROOT/out/smollm2-ort"
say "done: the bundle is in $ROOT/out/smollm2-ort"
