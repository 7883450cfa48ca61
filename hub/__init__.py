"""Moves models: convert, export, publish, verify."""

import minibert

minibert.register()
