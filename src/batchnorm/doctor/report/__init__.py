"""A diagnosis as a table for people, and as SARIF for tools."""
