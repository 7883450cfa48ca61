"""Uses models: encode, search, evaluate, plot."""
