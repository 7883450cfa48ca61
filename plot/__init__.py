"""Draw models and runs: as an interactive page (plotly), and some as an image too (matplotlib).

Every function returns a picture: ``.save("x.html")`` and ``.save("x.png")`` write it, and
the facts that it shows are its attributes.
"""

from minibert.plot.attention_maps import attention
from minibert.plot.page import Picture, read_texts
from minibert.plot.token_pieces import tokens
from minibert.plot.training_curves import training
from minibert.plot.vector_maps import embeddings, similarity

__all__ = ["Picture", "attention", "embeddings", "read_texts", "similarity", "tokens", "training"]
