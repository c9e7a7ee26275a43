"""Sweeps: many runs from one command, checked together, compared at the end."""
