"""`python -m benchmarks.gpu` runs it, where the packages are that it asks for."""

import sys
from importlib.util import find_spec

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "psutil", "rich", "tqdm", "xxhash")

if missing := [name for name in PACKAGES if find_spec(name) is None]:
    sys.exit(
        f"error: not installed: {', '.join(missing)}; install them with {sys.executable} -m pip install "
        f"{' '.join(missing)}, or, without a network, with --no-index --find-links FOLDER and their wheels in FOLDER"
    )

from benchmarks.gpu.command import main  # noqa: E402  what it imports asks for them

main()
