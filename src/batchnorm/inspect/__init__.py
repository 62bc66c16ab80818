"""One reading of a model: which layer feeds which normalization, who else reads it, what stands between.

`graph` is what every front end makes: `from_run` watches one run of an example, `from_export` reads the program
that `torch.export` writes down. `operators` says of every operator what it does to a value, and `folding` decides what
can be folded into what. `untouched` runs a model without leaving a trace on it.
"""
