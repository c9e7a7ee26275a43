"""Hydra sweepers of bfpo-exp, found by Hydra under the namespace ``hydra_plugins``."""
