"""Measurements of speed and memory, beside TRL where it can do the same: ``python -m benchmarks``."""
