"""Encode a corpus into a folder of vectors, index it, and search it."""
