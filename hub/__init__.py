"""Convert, export, publish, download and verify models."""

import minibert

minibert.register()
