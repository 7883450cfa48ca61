"""Measure models: retrieval, similarity, classification, tagging."""
