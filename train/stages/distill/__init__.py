"""Train a smaller student on the outputs of a larger, frozen teacher (the ``distill`` stage).

Each objective has a module. ``task`` uses labels and logits of a classifier (Hinton et al. 2015,
arXiv:1503.02531). ``pretraining`` uses the three losses of DistilBERT (Sanh et al. 2019,
arXiv:1910.01108). ``embedding`` uses vectors of an embedding model and their similarities.
"""
