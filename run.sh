#!/bin/sh
# Sets everything up, once, and edits the embedded model; arguments go to main.py:  sh run.sh dataset=fever num_seq=2
set -eu
CDPATH='' cd -- "$(dirname -- "$0")"
sh setup.sh
exec .venv/bin/python main.py "$@"
