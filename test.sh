#!/bin/sh
# The same set-up, then every test; arguments go to pytest:  sh test.sh -m "not slow"
set -eu
cd "$(dirname "$0")"
sh setup.sh
exec .venv/bin/python -m pytest "$@"
