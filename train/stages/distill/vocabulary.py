"""Make the vocabulary of a student from the most frequent tokens of the teacher."""

import copy
import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer


def keep_frequent_tokens(tokenizer: Any, counts: np.ndarray, size: int) -> tuple[Any, list[int]]:
    """Return a WordPiece tokenizer with its ``size`` most frequent tokens, and their earlier ids.

    ``counts`` has the count of each id in the texts. Special tokens stay, and so do the characters
    of the texts. A word whose token is dropped is therefore spelled with other tokens, and does not
    become unknown.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if (kind := state["model"]["type"]) != "WordPiece":
        raise ValueError(
            f"student_vocab_size needs a teacher with a WordPiece tokenizer, but this is {kind}; remove this field."
        )
    vocab, inside = state["model"]["vocab"], state["model"]["continuing_subword_prefix"]
    needed = {vocab[state["model"]["unk_token"]], *(token["id"] for token in state["added_tokens"])}
    used = {number: token.removeprefix(inside) for token, number in vocab.items() if counts[number] and number not in needed}
    spelled = {character for character in set().union(*used.values()) if {character, inside + character} <= vocab.keys()}
    needed |= {vocab[token] for character in spelled for token in (character, inside + character)}
    needed |= {number for number, token in used.items() if not spelled.issuperset(token)}
    if not len(needed) <= size <= len(counts):
        raise ValueError(
            f"student_vocab_size={size} is not possible: the teacher has {len(counts)} tokens, of which special tokens and "
            f"the characters of the texts are {len(needed)}. Choose a number between them."
        )
    by_frequency = np.argsort(-counts, kind="stable").tolist()
    kept = sorted([*needed, *(number for number in by_frequency if number not in needed)][:size])

    numbers = {old: new for new, old in enumerate(kept)}
    state |= {"padding": None, "truncation": None}  # those of the last batch
    # Added tokens get their new ids from the vocabulary, or the next free ones, when the tokenizer is read.
    state["model"]["vocab"] = {token: numbers[old] for token, old in vocab.items() if old in numbers}
    step = state["post_processor"] or {}
    for part in (step, *step.get("processors", ())):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [numbers[old] for old in token["ids"]]
        for name in {"cls", "sep"} & part.keys():
            part[name][1] = numbers[part[name][1]]
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(state))
    return smaller, kept
