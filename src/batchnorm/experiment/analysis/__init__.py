"""From the rows of all runs to claims with intervals, their words and summary.json."""
