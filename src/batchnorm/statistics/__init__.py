"""Exact moments of what layers see, pooled over calls, batches and ranks; whether batches look drawn at random."""
