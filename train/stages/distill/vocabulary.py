"""Make the vocabulary of a student from the most frequent tokens of the teacher."""

import copy
import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer


def frequent_tokens(tokenizer: Any, counts: np.ndarray, size: int) -> list[int]:
    """Return the ids of the ``size`` most frequent tokens of a WordPiece tokenizer, in ascending order.

    ``counts`` has the count of each id in the texts. Special tokens stay, and so do the characters
    of the texts. A word whose token is dropped is therefore spelled with other tokens, and does not
    become unknown.
    """
    model = getattr(tokenizer, "backend_tokenizer", tokenizer).model
    if (kind := type(model).__name__) != "WordPiece":
        raise ValueError(
            f"student_vocab_size needs a teacher with a WordPiece tokenizer, but this is {kind}; remove this field."
        )
    vocab, inside = tokenizer.get_vocab(), model.continuing_subword_prefix
    needed = {vocab[model.unk_token], *tokenizer.added_tokens_decoder}
    used = {number: token.removeprefix(inside) for token, number in vocab.items() if counts[number] and number not in needed}
    spelled = {character for character in set().union(*used.values()) if {character, inside + character} <= vocab.keys()}
    needed |= {vocab[token] for character in spelled for token in (character, inside + character)}
    needed |= {number for number, token in used.items() if not spelled.issuperset(token)}
    if not len(needed) <= size <= len(vocab):
        raise ValueError(
            f"student_vocab_size={size} is not possible: the teacher has {len(vocab)} tokens, of which special tokens and "
            f"the characters of the texts are {len(needed)}. Choose a number between them."
        )
    by_frequency = np.argsort(-counts, kind="stable").tolist()
    return sorted([*needed, *(number for number in by_frequency if number not in needed)][:size])


def keep_tokens(tokenizer: Any, kept: list[int]) -> Any:
    """Return a copy of ``tokenizer`` that has only the tokens ``kept``, numbered in this order."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    numbers = {old: new for new, old in enumerate(kept)}
    vocab = state["model"]["vocab"].items()
    state |= {"padding": None, "truncation": None}  # those of the last batch
    state["model"]["vocab"] = {token: numbers[old] for token, old in vocab if old in numbers}
    for token in state["added_tokens"]:
        token["id"] = numbers[token["id"]]
    step = state["post_processor"] or {}
    for part in (step, *step.get("processors", ())):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [numbers[old] for old in token["ids"]]
        for name in {"cls", "sep"} & part.keys():
            part[name][1] = numbers[part[name][1]]
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(state))
    return smaller


def keep_rows(encoder: Any, kept: list[int], pad_token_id: int, positions: int) -> Any:
    """Return ``encoder`` with the embeddings of the tokens ``kept`` and of the first ``positions``."""
    config, weights = copy.deepcopy(encoder.config), encoder.state_dict()
    config.vocab_size, config.pad_token_id = len(kept), pad_token_id
    config.max_position_embeddings = min(positions, config.max_position_embeddings)
    for name, rows in (("word", kept), ("position", slice(positions))):
        if (key := f"embeddings.{name}_embeddings.weight") in weights:
            weights[key] = weights[key][rows]
    smaller = type(encoder)(config)
    smaller.load_state_dict(weights)
    return smaller
