"""`python -m harness.memory` runs it."""

from harness.memory.command import main

main()
