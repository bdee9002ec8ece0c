#!/usr/bin/env bash
# Every check that can run on this machine: ruff, mypy, then the tests lane by lane, and a summary.
# Lanes that need hardware or services run too and print why they skip.
#
#   bash tests/run.sh [VENV_DIRECTORY]      default .venv in this repository, made and completed as needed
#
# tests/xla runs in an environment of its own, VENV_DIRECTORY-xla.
# Exit code: 0 all passed, 1 a lane failed, 2 the environment could not be made.
set -euo pipefail
venv=${1:-.venv}
case "$venv" in -*) echo "usage: bash tests/run.sh [VENV_DIRECTORY]" >&2; exit 2 ;; /*) ;; *) [ $# -eq 0 ] || venv="$PWD/$venv" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source .ci/venv.sh
ensure_venv "$venv" dev || exit 2

# Threads that wait for work sleep instead of spinning: on a busy machine spinning makes torch many times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

summary=()
failed=0
lane() {
    local name=$1 start=$SECONDS result=passed code=0
    shift
    printf '\n== %s\n' "$name"
    "$@" </dev/null || code=$?
    if [ "$code" -eq 5 ] && [ "${1##*/}" = python ]; then
        result="no tests"   # pytest's exit code for an empty lane
    elif [ "$code" -ne 0 ]; then
        result="FAILED (exit code $code)"
        failed=1
    fi
    summary+=("$(printf '%-14s %-22s %4d s' "$name" "$result" $((SECONDS - start)))")
}

python="$venv/bin/python"
two_files=(-n 2 --dist loadfile)   # at a time: most tests wait for one core, many for a process of their own
lane ruff "$venv/bin/ruff" check .
lane mypy "$venv/bin/mypy"
for folder in cpu sim xla aws neuron; do
    obstacle=
    [ "$folder" != xla ] || obstacle="$(xla_obstacle)"
    if ! compgen -G "tests/$folder/test_*.py" >/dev/null; then
        summary+=("$(printf '%-14s %s' "tests/$folder" "no tests yet")")
    elif [ -n "$obstacle" ]; then
        summary+=("$(printf '%-14s %s' "tests/$folder" "SKIPPED: $obstacle")")
    elif [ "$folder" = xla ]; then
        lane "$venv-xla" ensure_xla_venv "$venv-xla"
        lane "tests/$folder" "$venv-xla/bin/python" -m pytest -q "${two_files[@]}" "tests/$folder"
    else
        lane "tests/$folder" "$python" -m pytest -q "${two_files[@]}" "tests/$folder"
    fi
done

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
