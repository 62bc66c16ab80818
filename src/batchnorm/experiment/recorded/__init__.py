"""Runs that others trained: a table of (arm, seed, step, metric), its readers, and what writes one from a loop."""
