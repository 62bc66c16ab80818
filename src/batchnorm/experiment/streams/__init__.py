"""Data too large to hold: read from where they lie, a bounded piece at a time, in every pass over them anew."""
