"""Use trained models to encode texts and to predict labels, tags and answers."""

import minibert

minibert.register()
