"""Where things lie outside a run's own folder."""

from __future__ import annotations

from pathlib import Path

import platformdirs

ROOT = Path(__file__).resolve().parents[2]
# Converted models, data copies, base scores. XDG_CACHE_HOME moves it.
CACHE = Path(platformdirs.user_cache_dir("stableedit"))
