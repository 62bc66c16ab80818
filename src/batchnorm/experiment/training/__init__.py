"""One training run: the network, its arms, the optimization and what is looked at on the way."""
