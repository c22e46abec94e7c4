"""`python -m harness.ask` runs it."""

from harness.ask.command import main

main()
