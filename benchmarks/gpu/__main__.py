"""`python -m benchmarks.gpu` runs it."""

from benchmarks.gpu.command import main

main()
