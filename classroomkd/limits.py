"""Limits that the command line tells without importing what they belong to."""

# float32 bears it: at this temperature each lesson τ²·KL is still within 1e-3 of its value, or
# within a thousandth of it where it is above 1 (docs/method.md). The error grows with τ².
MAX_TEMPERATURE = 40.0
MAX_ALPHA = 1000.0  # of MixUp and CutMix, at which nearly every share is 1/2
