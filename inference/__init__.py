"""Uses models: encode, search, evaluate, plot."""

import minibert

minibert.register()
