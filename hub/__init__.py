"""Moves models: convert, export, publish, verify."""
