"""Encode a corpus into a folder of vectors, index the vectors, and search the corpus."""
