"""Log-probabilities of responses given their prompts."""
