"""What holds for every test: no network, no colour, and the same number of threads everywhere."""

from __future__ import annotations

import os

# Set before anything imports torch or transformers; processes that tests start inherit them.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1")
for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)
