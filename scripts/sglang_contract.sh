#!/usr/bin/env bash
# Runs the SGLang plugin's tests against the real SGLang, on a CPU, in an environment of its own.
#
# SGLang's wheel pins CUDA packages that a CPU can't use, so it is installed without its dependencies and gets the
# light ones that importing it needs. The environment is kept in the cache and rebuilt only when this file changes.
#   scripts/sglang_contract.sh [pytest arguments]     # all tests of the plugin, or those named
#   scripts/sglang_contract.sh --build                # the environment alone
#   PYTHON=python3.12 TORCH="torch==2.13.0+cpu" LIMIT=900 WORKERS=4 scripts/sglang_contract.sh
# Exits with 75 where the environment can't be built, saying why, and with pytest's code otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

SGLANG="sglang==0.5.23"
TORCH="${TORCH:-torch==2.13.0}"
LIMIT="${LIMIT:-1200}" # seconds, for building and for testing each
ROOT="${ECHO_RL_CACHE:-$HOME/.cache/echo-rl}/sglang-contract"
PYTHON="${PYTHON:-python3}"
KEY="$(cat "$0" <(echo "$TORCH") <("$PYTHON" --version) | sha256sum | cut -c1-12)"
VENV="$ROOT/$KEY"
UNAVAILABLE=75

LIGHT=(
  triton numpy scipy transformers safetensors tokenizers gguf compressed-tensors sentencepiece tiktoken einops
  pyzmq pydantic fastapi uvicorn uvloop orjson msgspec pybase64 psutil setproctitle prometheus-client pillow
  requests aiohttp interegular partial-json-parser packaging ipython python-multipart dill blobfile cloudpickle
  modelscope openai jinja2 ninja setuptools gymnasium tyro rich pytest pytest-timeout pytest-xdist hypothesis
)
BARE=("$SGLANG" apache-tvm-ffi==0.1.11 torchvision==0.28.0) # their dependencies are CUDA's, or there already

build() {
  rm -rf "$VENV.part"
  "$PYTHON" -m venv "$VENV.part"
  local pip=("$VENV.part/bin/python" -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" "$TORCH"
  "${pip[@]}" --constraint <("$VENV.part/bin/python" -m pip freeze 2>/dev/null | grep '^torch==') "${LIGHT[@]}"
  "${pip[@]}" --no-deps "${BARE[@]}"
}

# What a build that is cut off would leave is begun anew by the next; environments of other keys are of no use any more.
prepare() {
  [[ -e "$VENV/.ready" ]] && return
  local log code=0
  log="$(mktemp)"
  echo "building $VENV (at most $LIMIT s)" >&2
  export -f build
  export VENV PYTHON TORCH
  LIGHT_TEXT="${LIGHT[*]}" BARE_TEXT="${BARE[*]}" timeout --kill-after=10 "$LIMIT" bash -euo pipefail -c '
    read -ra LIGHT <<< "$LIGHT_TEXT"
    read -ra BARE <<< "$BARE_TEXT"
    build' >"$log" 2>&1 || code=$?
  if [[ "$code" != 0 ]]; then
    { grep -v '^WARNING: Location' "$log" || true; } | tail -n 5 >&2
    [[ "$code" == 124 || "$code" == 137 ]] && echo "$SGLANG was not installed within $LIMIT s" >&2
    echo "error: the environment with $SGLANG can't be built (exit code $code)" >&2
    rm -rf "$log" "$VENV.part"
    exit "$UNAVAILABLE"
  fi
  rm -f "$log"
  find "$ROOT" -mindepth 1 -maxdepth 1 ! -name "$KEY.part" -exec rm -rf {} +
  mv "$VENV.part" "$VENV"
  touch "$VENV/.ready"
}

prepare
[[ "${1:-}" == --build ]] && exit 0

export SGLANG_CONTRACT=1 CUDA_VISIBLE_DEVICES=
unset SGLANG_USE_CPU_ENGINE
(($#)) || set -- tests/integrations
exec timeout --kill-after=10 "$LIMIT" "$VENV/bin/python" -m pytest -p no:cacheprovider -n "${WORKERS:-2}" "$@"
