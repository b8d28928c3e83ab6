"""FVAR_BENCHMARK=tiny runs every benchmark once, at a size of seconds: that it still runs, not how fast."""

import os

TINY = os.environ.get("FVAR_BENCHMARK") == "tiny"
"""At this size ratios mean nothing, and are printed only."""
