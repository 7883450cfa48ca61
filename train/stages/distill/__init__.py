"""The ``distill`` stage: a smaller student learns from a larger, frozen teacher.

A module for each objective: a classifier's logits and the labels (Hinton et al. 2015,
arXiv:1503.02531), DistilBERT's triple loss over masked words (Sanh et al. 2019,
arXiv:1910.01108), and the vectors of an embedding model with their similarities.
"""
