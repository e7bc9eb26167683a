#!/usr/bin/env bash
# Install into .venv, then lint, type-check and run the tests. Any other argument goes to the last pytest run:
#   scripts/test.sh            everything; what continuous integration runs
#   scripts/test.sh --fast     without the tests that export or run a whole model, without kernels through the
#                              interpreters, and without those marked slow
#   scripts/test.sh -k cli     only the tests whose name has "cli" in it
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
marks=""
if [ "${1:-}" = "--fast" ]; then
  marks="not slow and not whole_model and not kernels"
  shift
fi
setup_environment ort,plugins,rtx,test,dev

failed="" times="installation $SECONDS s"
step() {
  local name="$1" began="$SECONDS"
  shift
  say "$name"
  "$@" || failed="$failed $name"
  times="$times, $name $((SECONDS - began)) s"
}

# Two threads per worker would only make two workers wait for each other.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
step ruff "$BIN/ruff" check .
# mypy has one thread: it runs beside the kernels, and is waited for behind them.
types="$(mktemp)"
"$BIN/mypy" >"$types" 2>&1 &
mypy=$!
# Kernels in a process of their own: Triton reads TRITON_INTERPRET once, when it is imported.
step kernels env TRITON_INTERPRET=1 "$BIN/python" -m pytest tests/plugins -q -n 2 -m "$marks"
step mypy bash -c 'tail --pid="$1" -f /dev/null; cat "$2"' - "$mypy" "$types"
wait "$mypy" || failed="$failed mypy"
rm -f "$types"
# The compiled kernels' PTX, on an interpreter of our own: Triton compiles here, so it must not interpret.
step ptx "$BIN/python" -m pytest tests/ptx -q -n 2 -m "$marks"
# A file stays with one worker: what its tests share is then made once. tests/conftest.py puts long files first.
step tests "$BIN/python" -m pytest tests --ignore=tests/plugins --ignore=tests/ptx -q -n 2 --dist loadfile --no-loadscope-reorder \
  --durations=25 -m "$marks" "$@"

printf '\ntook %s s: %s\n' "$SECONDS" "$times"
if [ -n "$failed" ]; then
  printf '\nfailed:%s\n' "$failed" >&2
  exit 1
fi
