"""The design of a study: which runs it has, and how settings are chosen from them."""
