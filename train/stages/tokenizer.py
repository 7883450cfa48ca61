"""Train tokenizers (the ``tokenizer`` stage)."""

from typing import Any

from minibert.data.load import check_columns, load, text_columns
from minibert.tokenization_minibert import train_word_level, train_wordpiece
from minibert.train.arguments import TokenizerStage
from minibert.train.stage import StageContext


def train_tokenizer(args: TokenizerStage, context: StageContext) -> dict[str, Any]:
    """Train and save a tokenizer, and return the number of rows and the vocabulary size."""
    parts = []
    for source in args.data:  # sources may have different columns
        dataset = load([source])
        columns = args.text_columns or text_columns(dataset)
        check_columns(dataset, columns, [source], filled=False)
        if not columns:
            raise ValueError(f"{source.path} has no string column; it has {', '.join(dataset.column_names)}. Set text_columns.")
        context.note_columns([source], dataset, {name: name for name in columns})
        parts.append(dataset.select_columns(columns))
    context.end_check()
    values = (value for part in parts for batch in part.iter(1000) for column in batch.values() for value in column if value)
    texts = (" ".join(value) if isinstance(value, list) else value for value in values)  # join lists of words
    train = train_wordpiece if args.method == "wordpiece" else train_word_level
    options = {} if args.min_frequency is None else {"min_frequency": args.min_frequency}
    tokenizer = train(
        texts,
        vocab_size=args.vocab_size,
        lowercase=args.lowercase,
        strip_accents=args.strip_accents,
        model_max_length=args.max_length,
        truncation_side=args.truncation_side,
        show_progress=True,
        **options,
    )
    tokenizer.save_pretrained(context.output_dir)
    return {"rows": sum(len(part) for part in parts), "vocab_size": len(tokenizer)}
