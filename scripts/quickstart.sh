#!/usr/bin/env bash
# From nothing but Python and pip to a real model that answers: install, export SmolLM2-135M-Instruct to ONNX,
# prove it equal to PyTorch, ask it something.   scripts/quickstart.sh ["your question"]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
question="${1:-What is the capital of France?}"
setup_environment ort
checkpoint="$(smollm2_gguf)"
bundle="$ROOT/out/smollm2-ort"

say "exporting $(basename "$checkpoint")"
"$BIN/gqa-export" onnx "$checkpoint" -o "$bundle" --target ort --no-validate --force
say "validating against PyTorch"
"$BIN/gqa-export" validate "$bundle" --against "$checkpoint"
say "asking: $question"
"$BIN/gqa-export" run "$bundle" --chat --prompt "$question" --max-new-tokens 128
say "done: the bundle is in $bundle"
