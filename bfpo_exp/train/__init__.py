"""Training: an engine that steps weights, objectives that give losses, and the loop between them."""
