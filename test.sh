#!/bin/sh
# The same set-up, then the tests, but for those that are slow by nature: kills, several processes, the real model.
# Arguments go to pytest, and -m "slow or not slow" runs all:  sh test.sh tests/editor
set -eu
CDPATH='' cd -- "$(dirname -- "$0")"
sh setup.sh
exec .venv/bin/python -m pytest -m "not slow" "$@"
