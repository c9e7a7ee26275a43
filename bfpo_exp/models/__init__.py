"""Models and tokenizers: made from random weights, or loaded from a folder or a hub id."""
