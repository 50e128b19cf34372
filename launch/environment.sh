# Sourced by the other scripts here: creates .venv once, installs constraints.txt's pins, activates it.
#
#   SORA_PYTHON   the Python to use (3.10 to 3.13; default: the first of these on the PATH)

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." # with CDPATH set, cd would look there first

find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10)
  [ -z "${SORA_PYTHON:-}" ] || candidates=("$SORA_PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "sora_llm needs Python 3.10, 3.11, 3.12 or 3.13; install one, or name it: SORA_PYTHON=/path/to/python bash $0" >&2
  return 1
}

install_into_venv() { # the first argument: what to install, e.g. ".[dev]"
  local wanted stamp=.venv/installed.txt
  wanted="$1 $(cat pyproject.toml constraints.txt | cksum)"
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # a venv that failed half-way has python but no pip
    local python
    python=$(find_python) || exit 1
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv || { echo "python3 -m venv failed: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
  fi
  if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "installing $1 into .venv (some minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$1" || exit 1
    echo "$wanted" >>"$stamp"
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
  # DeepSpeed compiles one small operator on CPU machines: once per environment, apart from other programs' builds.
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
}

warm_deepspeed() { # compile that operator now, so that two processes need not wait for each other
  python -c '
import sys
from sora_llm.errors import UserError
from sora_llm.extensions import await_build
try:
    await_build(lambda text: print(text, file=sys.stderr, flush=True))
except UserError as error:
    sys.exit(f"sora_llm: {error}")' || return 1
  DS_ACCELERATOR=cpu python -c '
from deepspeed.comm.torch import build_shm_op
build_shm_op()' >.venv/deepspeed_build.log 2>&1 || { cat .venv/deepspeed_build.log >&2; return 1; }
}
