"""`python -m harness.export` runs it."""

from harness.export.command import main

main()
