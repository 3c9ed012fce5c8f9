#!/usr/bin/env bash
# Runs the SGLang plugin's tests against the real SGLang, on a CPU, in a throw-away environment of its own.
#
# SGLang's wheel pins CUDA packages that a CPU can't use, so it is installed without its dependencies and gets the
# light ones that importing it needs. The environment is kept in the cache and rebuilt only when this file changes.
#   scripts/sglang_contract.sh [pytest arguments]
#   PYTHON=python3.12 TORCH="torch==2.13.0+cpu" LIMIT=900 scripts/sglang_contract.sh
set -euo pipefail
cd "$(dirname "$0")/.."

SGLANG="sglang==0.5.23"
TORCH="${TORCH:-torch==2.13.0}"
LIMIT="${LIMIT:-1200}" # seconds, for building and for testing each
ROOT="${ECHO_RL_CACHE:-$HOME/.cache/echo-rl}/sglang-contract"
KEY="$(cat "$0" <(echo "$TORCH") | sha256sum | cut -c1-12)"
VENV="$ROOT/$KEY"

LIGHT=(
  triton numpy scipy transformers safetensors tokenizers gguf compressed-tensors sentencepiece tiktoken einops
  pyzmq pydantic fastapi uvicorn uvloop orjson msgspec pybase64 psutil setproctitle prometheus-client pillow
  requests aiohttp interegular partial-json-parser packaging ipython python-multipart dill blobfile cloudpickle
  modelscope openai jinja2 ninja setuptools gymnasium tyro rich pytest pytest-timeout hypothesis
)
BARE=("$SGLANG" apache-tvm-ffi==0.1.11 torchvision==0.28.0) # their dependencies are CUDA's, or there already

build() {
  rm -rf "$VENV.part"
  "${PYTHON:-python3}" -m venv "$VENV.part"
  local pip=("$VENV.part/bin/python" -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" "$TORCH"
  "${pip[@]}" --constraint <("$VENV.part/bin/python" -m pip freeze 2>/dev/null | grep '^torch==') "${LIGHT[@]}"
  "${pip[@]}" --no-deps "${BARE[@]}"
}

if [[ ! -e "$VENV/.ready" ]]; then
  export -f build
  echo "building $VENV (at most $LIMIT s)" >&2
  export VENV SGLANG TORCH
  LIGHT_TEXT="${LIGHT[*]}" BARE_TEXT="${BARE[*]}" timeout "$LIMIT" bash -euo pipefail -c '
    read -ra LIGHT <<< "$LIGHT_TEXT"
    read -ra BARE <<< "$BARE_TEXT"
    build'
  rm -rf "$VENV"
  mv "$VENV.part" "$VENV"
  touch "$VENV/.ready"
fi

export SGLANG_CONTRACT=1 CUDA_VISIBLE_DEVICES=
unset SGLANG_USE_CPU_ENGINE
exec timeout "$LIMIT" "$VENV/bin/python" -m pytest -p no:cacheprovider tests/integrations "$@"
