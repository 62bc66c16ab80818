"""One file a rule: what it needs, how it decides, its evidence and its fix. Found by the registry, by being here."""
