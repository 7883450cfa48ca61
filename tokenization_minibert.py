"""Train a WordPiece or a word-level tokenizer that treats text as BERT's tokenizer does.

The normalizer, the split into words and punctuation, the prefix ``##`` of tokens inside a word
and the format ``[CLS] first [SEP] second [SEP]`` are as in BERT. The result is a
``PreTrainedTokenizerFast``, which ``AutoTokenizer`` loads without this package. The same texts
in the same order always give the same vocabulary.
"""

import logging
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
SPECIAL_TOKENS = tuple(_SPECIAL.values())
CONTINUING = "##"

# BERT's WordPiece replaces longer words by [UNK], so training ignores them.
_LONGEST_WORD = 100
# At most this many different words are counted (about 300 MB). The rarest words are dropped.
_MOST_WORDS = 2_000_000
_MOST_CHUNKS = 200_000
# The rarest characters, which together make up less than this share of the text, become [UNK]
# as in SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226). Otherwise a single page in
# another writing system could fill the vocabulary.
_IGNORED_CHARACTERS = 1e-4
# Accents stay if more than this share of the words would lose letters: about 10 % in Russian, at most 0.1 % in English.
_LOST_WORDS = 0.01
# The tokenizers library counts pairs in 32 bits. Counts of larger corpora are scaled down.
_MOST_TRAINED_WORDS = 100_000_000


def train_wordpiece(
    texts: Iterable[str],
    *,
    vocab_size: int = 30000,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    min_frequency: int = 2,
    model_max_length: int = 512,
    truncation_side: str = "right",
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer like BERT's (Devlin et al. 2018, arXiv:1810.04805).

    Args:
        texts: Corpus. A generator is possible, since the corpus is read only once.
        vocab_size: Number of entries, including special tokens. If there is too little text,
            the vocabulary is smaller and a warning is shown.
        lowercase: Whether to convert texts to lower case.
        strip_accents: Whether to strip accents. By default, they are stripped with ``lowercase``,
            unless more than 1 % of the words would lose letters, as in Russian, Hindi or Korean.
        min_frequency: How often two tokens must be neighbours to be merged into one token.
        model_max_length: Length in tokens to which texts are truncated.
        truncation_side: Where longer texts are cut. ``"right"`` keeps the beginning of a text.
            ``"left"`` keeps the end.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: if ``texts`` contains no word or an item that is not a string, or if
            ``vocab_size`` is too small for the characters in ``texts``.
    """
    words, normalizer = _count_words(texts, lowercase, strip_accents, show_progress)
    alphabet = _alphabet(words)
    words = {word: count for word, count in words.items() if alphabet.issuperset(word)}
    # The library numbers "##c" pieces randomly, so vocabularies would differ between runs.
    # Special tokens keep their order, so all single characters are passed as special tokens.
    continuing = sorted({CONTINUING + character for word in words for character in word[1:]})
    pieces = [*SPECIAL_TOKENS, *sorted(alphabet), *continuing]
    if vocab_size < len(pieces):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the {len(alphabet)} characters of the text and the {len(SPECIAL_TOKENS)} "
            f"special tokens need {len(pieces)} entries before any longer piece; use a larger vocab_size."
        )
    scratch = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    scratch.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=pieces,
        limit_alphabet=0,  # all of it is in `pieces`
        continuing_subword_prefix=CONTINUING,
        show_progress=False,
    )
    scratch.train_from_iterator(_repeated(words), trainer)
    model = models.WordPiece(
        scratch.get_vocab(),
        unk_token="[UNK]",
        continuing_subword_prefix=CONTINUING,
        max_input_chars_per_word=_LONGEST_WORD,
    )
    return _finished(model, normalizer, vocab_size, model_max_length, truncation_side)


def train_word_level(
    texts: Iterable[str],
    *,
    vocab_size: int = 30000,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    min_frequency: int = 1,
    model_max_length: int = 512,
    truncation_side: str = "right",
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer whose tokens are whole words. All unknown words become ``[UNK]``.

    The vocabulary contains the most frequent words that occur at least ``min_frequency`` times.
    All arguments except ``min_frequency`` are as in :func:`train_wordpiece`.

    Raises:
        ValueError: if ``texts`` contains no word or an item that is not a string, or if
            ``vocab_size`` leaves no room for words.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} entries are special tokens; "
            f"use at least {len(SPECIAL_TOKENS) + 1}."
        )
    words, normalizer = _count_words(texts, lowercase, strip_accents, show_progress)
    frequent = sorted((word for word, count in words.items() if count >= min_frequency), key=lambda word: (-words[word], word))
    tokens = [*SPECIAL_TOKENS, *frequent][:vocab_size]
    model = models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]")
    return _finished(model, normalizer, vocab_size, model_max_length, truncation_side)


def _count_words(
    texts: Iterable[str], lowercase: bool, strip_accents: bool | None, show_progress: bool
) -> tuple[dict[str, int], normalizers.Normalizer]:
    """Return how often each normalized word occurs, and the normalizer."""
    if isinstance(texts, str):
        raise ValueError("A tokenizer is trained on several texts, but one string was given; put it into a list.")
    keep = lowercase and not strip_accents  # if strip_accents is None, until all words are known
    bert = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False if keep else strip_accents)
    normalizer = normalizers.Sequence([normalizers.NFC(), bert]) if keep else bert  # NFC: one spelling of letters with marks
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    chunks: Counter[str] = Counter()  # split at spaces only, so the exact split runs once per different chunk

    def settle() -> None:
        for chunk, count in chunks.items():
            for word, _ in splitter.pre_tokenize_str(chunk):
                if len(word) <= _LONGEST_WORD:
                    words[word] += count
        chunks.clear()
        floor = 1
        while len(words) > _MOST_WORDS:
            for word in [word for word, count in words.items() if count <= floor]:
                del words[word]
            floor *= 2

    number = 0
    for number, text in enumerate(tqdm(texts, desc="Counting words", unit=" texts", disable=not show_progress), start=1):
        if not isinstance(text, str):
            raise ValueError(f"Text {number} of the tokenizer's corpus is {text!r}; use only strings.")
        chunks.update(normalizer.normalize_str(text).split())
        if len(chunks) > _MOST_CHUNKS:
            settle()
    settle()
    if keep and strip_accents is None and words:
        losing = {character for character in set().union(*words) if _loses_letters(character)}
        lost = sum(count for word, count in words.items() if not losing.isdisjoint(word)) / words.total()
        choice = "kept" if lost > _LOST_WORDS else "stripped"
        logger.info("Accents are %s: stripping takes letters from %.1f %% of the words.", choice, 100 * lost)
        if lost <= _LOST_WORDS:
            normalizer = normalizers.BertNormalizer(lowercase=True)
            for word, count in words.items():
                chunks[normalizer.normalize_str(word)] += count
            words.clear()
            settle()
    if not words:
        raise ValueError(f"A tokenizer cannot be trained on {number} texts without a word; give texts that contain words.")
    return words, normalizer


def _loses_letters(character: str) -> bool:
    """Return True if stripping accents would take or change a letter, as in й, が, 한 and the vowels of Hindi."""
    parts = unicodedata.normalize("NFD", character)
    marked = parts != character or unicodedata.category(character) == "Mn"
    return marked and not unicodedata.name(parts[0], "").startswith(("LATIN", "GREEK", "COMBINING", "VARIATION"))


def _alphabet(words: dict[str, int]) -> set[str]:
    """Return the characters in ``words``. Leave out the rarest 0.01 % of the text.

    >>> sorted(_alphabet({"ab": 10_000, "c": 1}))
    ['a', 'b']
    """
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    allowance = _IGNORED_CHARACTERS * counts.total()
    for character in sorted(counts, key=lambda character: (counts[character], character)):
        allowance -= counts[character]
        if allowance < 0:
            break
        del counts[character]
    return set(counts)


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Yield texts with ``words[word]`` copies of each word, or fewer in a very large corpus."""
    scale = -(-sum(words.values()) // _MOST_TRAINED_WORDS)
    for word, count in words.items():
        copies = -(-count // scale)
        for done in range(0, copies, 1000):
            yield " ".join([word] * min(copies - done, 1000))


def _finished(
    model: models.Model, normalizer: normalizers.Normalizer, vocab_size: int, model_max_length: int, truncation_side: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        warnings.warn(
            f"The texts are enough for {size} entries, fewer than vocab_size={vocab_size}; the tokenizer has {size} entries.",
            stacklevel=3,
        )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUING)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=model_max_length,
        truncation_side=truncation_side,
        **_SPECIAL,
    )
