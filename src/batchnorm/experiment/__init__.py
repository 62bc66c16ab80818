"""The study behind `batchnorm study`: data, networks, plan, training, records, claims and the report."""
