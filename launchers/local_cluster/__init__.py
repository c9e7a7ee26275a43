"""A real SLURM of a few nodes on one machine, started and stopped by any user: docs/slurm-local.md.

It needs the Python standard library and the machine's SLURM packages, nothing of bfpo-exp.
"""
