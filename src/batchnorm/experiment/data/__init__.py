"""Data sources: read, checked, split and standardized; held in memory or streamed."""
