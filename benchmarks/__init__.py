"""Measurements, a file each: the documents that show a table say the command that makes it."""
