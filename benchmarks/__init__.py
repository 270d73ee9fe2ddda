"""Benchmarks: ratios measured in one run, on the same weights and inputs, with equal numbers checked."""
