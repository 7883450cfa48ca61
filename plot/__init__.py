"""Draw models and training runs as interactive pages (plotly) and images (matplotlib).

The functions ``attention``, ``embeddings``, ``similarity`` and ``training`` return a picture.
The attributes of a picture contain the data. ``save("x.html")`` and ``save("x.png")`` write the
picture to a file.
"""

from minibert.plot.attention_maps import attention
from minibert.plot.page import Picture, read_texts
from minibert.plot.token_pieces import tokens
from minibert.plot.training_curves import training
from minibert.plot.vector_maps import embeddings, similarity

__all__ = ["Picture", "attention", "embeddings", "read_texts", "similarity", "tokens", "training"]
