#!/usr/bin/env bash
# Makes the environment of side (b): TRL with the torch and transformers that the trainer has.
#
#     bash benchmarks/sides/trl_env.sh FOLDER      # then: side_by_side.py --trl-python FOLDER/bin/python
set -euo pipefail

PYTHON=${PYTHON:-$(command -v python3.11 || echo python3)}
"$PYTHON" -m venv "${1:?usage: trl_env.sh FOLDER}"
# By this plain line and before all else, as in tools/setup_env.sh.
"$1/bin/pip" install torch==2.13.0
"$1/bin/pip" install trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 tokenizers==0.23.3
