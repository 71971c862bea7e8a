"""Scoring: perplexity, divergence from the float model, paired statistics."""
