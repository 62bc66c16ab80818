"""Differential fuzzing: each tool on random programs, against the untouched program in float64."""
