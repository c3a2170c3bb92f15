"""Judging a model: accuracy, cost, equivalence, latency."""
