"""Benchmarks: ratios measured in one run, on the same weights and inputs, with equal numbers checked."""

import os

# Read when the peers are imported: no look-ups on the hub for a model that is at hand, no bars among the results.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
