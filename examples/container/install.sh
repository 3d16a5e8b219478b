#!/usr/bin/env bash
# The two environments of A100 nodes: `bash examples/container/install.sh [FOLDER]`, from the repository's root, makes
# FOLDER/.venv and FOLDER/.venv-sidecar (here, without one). On a machine with nvcc of CUDA 13 and a C++ compiler; a GPU
# is not needed. Most of its time goes into compiling flash-attn. Not yet run to its end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-.}
python=${PYTHON:-python3}

"$python" -m venv "$folder/.venv"
pip=$folder/.venv/bin/pip
"$pip" install torch==2.13.0 setuptools wheel ninja packaging
"$pip" install '.[eval,hub,report]'
# Transformer Engine's extension is C++ alone: it wants the headers of cuDNN and NCCL that came with torch. Without
# core_cu13 its core library would be CUDA 12's.
site=$("$folder/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export CPATH=$site/nvidia/cudnn/include:$site/nvidia/nccl/include:$site/nvidia/cu13/include${CPATH:+:$CPATH}
NVTE_PYTORCH_FORCE_BUILD=TRUE "$pip" install --no-build-isolation 'transformer-engine[core_cu13,pytorch]==2.11.0'
# Of A100s: sm_80 alone, or it takes hours. Each job of the compiler takes up to 8 GB.
FLASH_ATTN_CUDA_ARCHS=${FLASH_ATTN_CUDA_ARCHS:-80} MAX_JOBS=${MAX_JOBS:-8} \
    "$pip" install --no-build-isolation flash-attn==2.8.3

"$python" -m venv "$folder/.venv-sidecar"
"$folder/.venv-sidecar/bin/pip" install vllm==0.32.0

# Both sides of a weight push by NCCL must be one version of it.
for environment in .venv .venv-sidecar; do
    "$folder/$environment/bin/python" -c 'import torch; print(torch.__version__, "NCCL", torch.cuda.nccl.version())'
done
"$folder/.venv/bin/python" -c 'import flash_attn, transformer_engine.pytorch'
