"""Pictures of models and runs, each as an interactive page (plotly) or an image (matplotlib).

Every function returns a picture: ``.interactive()`` is its plotly figure, ``.static()`` its matplotlib figure,
``.save("x.html")`` and ``.save("x.png")`` write them, and the facts that are drawn are its attributes.
"""

from minibert.inference.plot_attention import Attention, attention
from minibert.inference.plot_page import Picture, check_output, read_texts
from minibert.inference.plot_tokens import Token, Tokens, tokens
from minibert.inference.plot_training import Run, Training, training
from minibert.inference.plot_vectors import METHODS, Embeddings, Panel, Similarity, embeddings, similarity

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
