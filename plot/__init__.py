"""Pictures of models and runs, each as an interactive page (plotly) or an image (matplotlib).

Every function returns a picture: ``.interactive()`` is its plotly figure, ``.static()`` its matplotlib figure,
``.save("x.html")`` and ``.save("x.png")`` write them, and the facts that are drawn are its attributes.
"""

from minibert.plot.attention_maps import Attention, attention
from minibert.plot.page import Picture, check_output, read_texts
from minibert.plot.token_pieces import Token, Tokens, tokens
from minibert.plot.training_curves import Run, Training, training
from minibert.plot.vector_maps import METHODS, Embeddings, Panel, Similarity, embeddings, similarity

__all__ = [
    "METHODS",
    "Attention",
    "Embeddings",
    "Panel",
    "Picture",
    "Run",
    "Similarity",
    "Token",
    "Tokens",
    "Training",
    "attention",
    "check_output",
    "embeddings",
    "read_texts",
    "similarity",
    "tokens",
    "training",
]
