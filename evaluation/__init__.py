"""Evaluate models on retrieval, similarity, classification and tagging."""
