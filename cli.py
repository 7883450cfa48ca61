"""Define the subcommands of ``minibert``. A subcommand imports its modules when it runs."""

import errno
import functools
import inspect
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from minibert.files.terminal import Record, printable

_PLAIN: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "rich_markup_mode": None}
app = typer.Typer(help="Train, use and share a compact BERT-like text encoder.", add_completion=False, **_PLAIN)

_DATA = "Text file (a text per line), CSV, TSV, JSON (lines), Parquet, Hub data set"

Debug = Annotated[bool, Option("--debug", help="Show the full traceback of an error.")]
Json = Annotated[bool, Option("--json", help="Print the result as one JSON object on standard output.")]
TrustRemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Model = Annotated[str, Argument(help="Model folder, or the id (owner/name) of a model on the Hub.")]
Split = Annotated[str, Option(help="Split of a folder or Hub data set; a single file is read completely.")]
Force = Annotated[bool, Option("--force", help="Replace the file of --out.")]
NewModel = Annotated[Path, Argument(metavar="OUT", help="New folder for the model.")]
Limit = Annotated[int, Option(min=1, help="Number of texts of a file to show, drawn at random.")]
Dtype = Annotated[str | None, Option(help="float32, float16 or bfloat16; the default is the model's.")]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of a model on the Hub.")]
Overrides = Annotated[list[str] | None, Argument(metavar="[STAGE.FIELD=VALUE]...", help="Fields to change; values are YAML.")]
RunFolder = Annotated[Path | None, Option(help="Folder of the run; the default is runs/<recipe name>.")]
RunAgain = Annotated[bool, Option("--force", help="Run changed stages, and those after them, again.")]


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print ``text``, in which the characters that control a terminal are escaped."""
    typer.echo(printable(str(text)), err=err, nl=nl)


def main() -> None:
    """Run the ``minibert`` command.

    The exit status is 0 for success, 1 for a failed check, 2 for wrong input, 130 for Ctrl-C.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; the next file would take its number, and what is printed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - it stays open
    app(prog_name="minibert")


_FULL = "Free some space, or put the result, HF_HOME (caches) or TMPDIR on another disk, then try again."
_LOCKED = "Change its permissions, or choose another path (HF_HOME sets that of caches)."
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL),
    errno.EFBIG: "Use a disk that allows larger files, or raise the limit (ulimit -f), then try again.",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _LOCKED),
    errno.ENOENT: "Restore what was moved or deleted, or correct the path, then try again.",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "A file, or a link to nothing, stands in the way; choose another path."),
    **dict.fromkeys((errno.EISDIR, errno.ENAMETOOLONG), "Correct the path."),
    errno.ENOTEMPTY: "Move its files to another folder, then try again.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), then try again.",
}


def _sentence(error: BaseException, extra: str) -> str | None:
    """Return a message about ``error`` for the user, or None if the error is a bug."""
    from huggingface_hub.errors import StrictDataclassError

    from minibert.files.installation import EXTRAS, missing

    if isinstance(error, ModuleNotFoundError):
        module = str(error.name).split(".")[0]
        if module not in EXTRAS:
            return None
        return missing(f"This command needs {module}", extra or EXTRAS[module])
    # A library that could not write may fail once more while it closes the file.
    first = error.__context__
    if isinstance(first, OSError) and _ADVICE.get(first.errno or 0) == _FULL and not error.__suppress_context__:
        error = first
    text = str(error)
    # torch and tokenizers raise exceptions of their own, which contain only the text of a
    # system error.
    if isinstance(error, MemoryError) or re.search("can't allocate|Cannot allocate memory|out of memory", text):
        return "There is not enough memory; use a smaller model, batch or file, or a machine with more memory."
    if isinstance(error, TypeError) and "TextEncodeInput" in text:  # tokenizers takes no lone surrogate for a text
        return "A text is not UTF-8; convert it, as with iconv -f latin1 -t utf8."
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        found = re.search(r"\(os error (\d+)\)", text)
        number = int(found[1]) if found else None
    if number in _ADVICE:
        return f"{' '.join(text.split()).rstrip('.')}. {_ADVICE[number]}"
    if isinstance(error, OSError | StrictDataclassError):
        return " ".join(text.split())  # libraries write paragraphs
    return text if isinstance(error, ValueError | ArithmeticError) else None


@contextmanager
def plain_errors(interrupted: str, extra: str) -> Iterator[None]:
    """Print an error of the input or of the system as one sentence, and exit.

    ``interrupted`` is the message after Ctrl-C. If a module is missing, recommend the pip extra
    ``extra``, or without it the extra that contains the module.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        advice = interrupted.format(command=f"minibert {shlex.join(sys.argv[1:])}")
        echo(f"\n{str(stop) or 'Interrupted.'} {advice}", err=True)
        raise typer.Exit(130) from None
    except Exception as error:  # importing the classes of user errors here would slow every --help
        # Typer ends quietly when the reader of standard output has closed the pipe.
        if isinstance(error, BrokenPipeError) or (sentence := _sentence(error, extra)) is None:
            raise
        echo(f"Error: {sentence}", err=True)
        # An ArithmeticError is a loss that is not finite, or different outputs of two models
        # that should be equal.
        raise typer.Exit(1 if isinstance(error, ArithmeticError) else 2) from None


_RESUME = "To resume: {command}"


def _command(
    group: typer.Typer, example: str, *, interrupted: str = "Nothing was written.", extra: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that registers a function as a command of ``group``."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, debug: bool, **options: Any) -> None:
            logging.setLogRecordFactory(Record)
            with nullcontext() if debug else plain_errors(interrupted, extra):
                function(**options)

        shown = inspect.signature(function)
        last = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        run.__signature__ = shown.replace(parameters=[*shown.parameters.values(), last])  # type: ignore[attr-defined]
        group.command(epilog=example)(run)
        return function

    return add


def print_json(value: Any) -> None:
    """Print ``value`` on standard output as one JSON object."""
    echo(json.dumps(value, indent=2, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        from minibert.files import installation

        echo(f"minibert {installation.version()}")
        _name_foreign()
        raise typer.Exit


def _name_foreign() -> None:
    """Warn if another project named ``minibert`` is installed."""
    from minibert.files.installation import foreign

    if warning := foreign():
        echo(f"Warning: {warning}", err=True)


@app.callback()
def _root(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


def _report_progress(bars: bool = True) -> None:
    """Log the progress of this package, and hide the logs of libraries."""
    logger = logging.getLogger("minibert")
    logger.handlers, logger.propagate = [logging.StreamHandler()], False
    logger.setLevel(logging.INFO)
    _silence_libraries(bars=bars)


def _silence_libraries(bars: bool = False) -> None:
    """Hide the logs and progress bars of libraries. ``bars`` keeps bars of ``datasets``."""
    from datasets import disable_progress_bars
    from datasets.utils.logging import CRITICAL, set_verbosity
    from transformers.utils import logging

    if not bars:
        disable_progress_bars()
    set_verbosity(CRITICAL)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@_command(
    app,
    "Example:  minibert train recipes/tinybert.yaml embed.batch_size=128 --output-dir runs/larger-batch",
    interrupted=_RESUME,
    extra="train",
)
def train(
    recipe: Annotated[str, Argument(help="Recipe file, or the name of a bundled recipe such as tinybert.")],
    overrides: Overrides = None,
    output_dir: RunFolder = None,
    force: RunAgain = False,
    as_json: Json = False,
) -> None:
    """Train models with a recipe, or resume an interrupted run from its last checkpoint.

    To use several processes: torchrun --nproc_per_node N -m minibert train RECIPE.
    """
    from minibert.files.processes import processes
    from minibert.train.recipe import load_recipe
    from minibert.train.run import read_metrics, run_recipe

    _report_progress()
    run_dir = run_recipe(load_recipe(recipe, overrides or []), output_dir=output_dir, force=force)
    if not processes().is_main_process:
        return
    stages = read_metrics(run_dir)
    if as_json:
        print_json({"output_dir": str(run_dir), "stages": stages})
        return
    for stage, metrics in stages.items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
        short = {name: value if isinstance(value, int) else f"{value:.4g}" for name, value in numbers.items()}
        echo(f"{stage}: {', '.join(f'{name} {value}' for name, value in short.items())}")
        for name, result in metrics.items():
            if isinstance(result, dict) and "systems" in result:
                from minibert.evaluation.evaluate import metrics_table  # needs more extras than training

                echo(f"{name}\n{metrics_table(result)}")
    echo(f"The run is in {run_dir}.")


@_command(
    app,
    'Examples:  minibert search runs/notes-vectors "how do I sort a list" --top-k 3\n\n'
    'minibert search runs/quickstart/2-embed --passages notes.txt "how do I sort a list"',
    interrupted="The vectors are unchanged; search again.",
)
def search(
    target: Annotated[str, Argument(metavar="INDEX|MODEL", help="Folder of vectors; with --passages: model folder or id.")],
    queries: Annotated[
        list[str] | None, Argument(metavar="[QUERY]...", help="What to look for; unset reads standard input.")
    ] = None,
    passages: Annotated[str | None, Option(metavar="FILE", help=f"Search it with the MODEL: {_DATA}.")] = None,
    column: Annotated[str | None, Option(help="Column of --passages, if several hold texts.")] = None,
    queries_file: Annotated[str | None, Option("--queries", metavar="FILE", help=f"Read queries: {_DATA}.")] = None,
    top_k: Annotated[int, Option(min=1, help="Number of passages to show for each query.")] = 5,
    hybrid: Annotated[bool, Option("--hybrid", help="With an INDEX: rank by words (BM25) too.")] = False,
    exact: Annotated[bool, Option("--exact", help="With an INDEX: compare with every vector.")] = False,
    rebuild: Annotated[bool, Option("--rebuild", help="With an INDEX: build it again.")] = False,
    model: Annotated[str | None, Option(help="With an INDEX: the model that made it, if it has moved.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON; of --queries and typed queries an object per line.")] = False,
) -> None:
    """Find the passages that answer a query, in a folder of vectors or in --passages FILE.

    INDEX is a folder of vectors. With --passages, give a MODEL instead. The first search in a
    folder of vectors builds an index. Later searches add new vectors to the index.
    """
    from minibert.search.search import FolderSearcher, Searcher, check_queries, read_passages, read_queries

    _report_progress(bars=False)
    if queries and queries_file is not None:
        raise ValueError("Queries are given on the command line and with --queries; use only one of the two.")
    check_queries(queries or [])
    if queries_file is not None:
        queries = read_queries(queries_file)
    searcher: Searcher
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "show_progress": sys.stderr.isatty()}
    of_index: dict[str, Any] = {"model": model, "hybrid": hybrid, "exact": exact, "rebuild": rebuild}
    if passages is None:
        if column is not None:
            raise ValueError("--column can only be used with --passages; leave it out to search a folder of vectors.")
        searcher = FolderSearcher(target, **of_index, **options)
    else:
        if misplaced := [name for name, value in of_index.items() if value]:
            wanted = f"make one with: minibert encode {target} {passages} OUT"
            raise ValueError(f"--{misplaced[0]} needs a folder of vectors; {wanted}")
        searcher = Searcher(target, read_passages(passages, column), **options)
    given = queries or []
    as_list, answers = as_json and bool(given) and queries_file is None, []
    batches: Iterator[list[str]] = (given[at : at + 1024] for at in range(0, len(given), 1024))
    for batch in batches if given else ([query] for query in _typed_queries()):
        for query, hits in zip(batch, searcher.search(batch, top_k)):
            answer = {"query": query, "hits": [hit._asdict() for hit in hits]}
            if as_list:
                answers.append(answer)
            else:
                echo(json.dumps(answer, ensure_ascii=False) if as_json else _in_lines(query, hits))
    if as_list:
        print_json(answers)


def _in_lines(query: str, hits: list[Any]) -> str:
    from textwrap import shorten

    lines = [query]
    for rank, hit in enumerate(hits, start=1):
        shown = f"id {hit.id}" if hit.passage is None else shorten(hit.passage, 300, placeholder=" …")
        lines.append(f"{rank:4d}  {hit.score:.4f}  {shown}")
    return "\n".join([*lines, ""])


def _typed_queries() -> Iterator[str]:
    """Yield lines of standard input, until an empty line or the end."""
    while True:
        if sys.stdin.isatty():
            echo("Query (empty to leave): ", nl=False, err=True)
        if not (query := sys.stdin.readline().strip()):
            return
        yield query


@_command(
    app,
    "Example:  minibert encode runs/quickstart/2-embed notes.jsonl notes-vectors --column body --keep-text",
    interrupted=_RESUME,
)
def encode(
    model: Model,
    data: Annotated[str, Argument(metavar="INPUT", help=f"{_DATA}, or folder of files.")],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder of vectors, new or to be resumed.")],
    column: Annotated[str | None, Option(help="Column of the texts, if several hold strings.")] = None,
    id_column: Annotated[str | None, Option(help="Column of ids; the default numbers rows from 0.")] = None,
    split: Split = "train",
    keep_text: Annotated[bool, Option("--keep-text", help="Store the texts with the vectors.")] = False,
    precision: Annotated[str, Option(help="Stored as float32, float16, int8 or binary.")] = "float32",
    rows_per_shard: Annotated[int, Option(help="Rows in a shard; a kill loses at most one shard.")] = 50_000,
    on_bad_row: Annotated[str, Option(help="For rows without a text: refuse, or skip.")] = "refuse",
    append: Annotated[bool, Option("--append", help="Encode the files that are new in INPUT.")] = False,
    force: Annotated[bool, Option("--force", help="Start again, replacing the vectors in OUT.")] = False,
    dtype: Annotated[str, Option(help="Compute in auto, float32, bfloat16 or float16.")] = "auto",
    batch_tokens: Annotated[int | None, Option(help="Tokens in a batch; the default suits the device.")] = None,
    normalize: Annotated[bool, Option("--normalize", help="Scale the vectors to length 1.")] = False,
    truncate_dim: Annotated[int | None, Option(help="Dimensions to keep; the default is the model's setting.")] = None,
    prompt: Annotated[str | None, Option(help="Text to put before every text.")] = None,
    prompt_name: Annotated[str | None, Option(help="Prompt of the model; the default is for passages.")] = None,
    device: Annotated[str | None, Option(help="Such as cpu or cuda:1; the default is the best.")] = None,
    explain: Annotated[bool, Option("--explain", help="Print what was chosen, and why.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Encode a corpus of any size into a folder of Parquet files, or resume the encoding.

    To use several processes: torchrun --nproc_per_node N -m minibert encode ... The processes
    may run on several machines.
    """
    from minibert.files.processes import processes
    from minibert.search.encode_corpus import encode_corpus

    _silence_libraries()
    options: dict[str, Any] = {
        **{"column": column, "id_column": id_column, "split": split, "on_bad_row": on_bad_row},
        **{"keep_text": keep_text, "precision": precision, "rows_per_shard": rows_per_shard},
        **{"dtype": dtype, "batch_tokens": batch_tokens, "device": device, "normalize": normalize},
        **{"prompt": prompt, "prompt_name": prompt_name, "append": append, "force": force, "truncate_dim": truncate_dim},
        **{"trust_remote_code": trust_remote_code, "show_progress": sys.stderr.isatty()},
    }
    done = encode_corpus(model, data, out, **options)
    if not processes().is_main_process:
        return
    manifest, shards = done.manifest, len(done.manifest.shards)
    if as_json:
        names = ("rows", "dimension", "precision", "skipped", "skipped_rows")
        of_folder = {name: getattr(manifest, name) for name in names}
        of_run = {"written": done.written, "seconds": round(done.seconds, 3), "decisions": done.decisions}
        print_json({"out": str(out), **of_folder, "shards": shards, **of_run})
        return
    if explain:
        for name, choice in done.decisions.items():
            echo(f"{name}: {choice}")
    if done.written:
        rate = done.written / done.seconds
        echo(f"{done.written:,} vectors were written in {done.seconds:,.1f} s, {rate:,.0f} per second.")
    else:
        echo("Nothing was left to do." if manifest.rows else "No row could be used.")
    if manifest.skipped:
        first = ", ".join(f"{row} ({reason})" for row, reason in manifest.skipped_rows[:5])
        more = f" and {manifest.skipped - 5:,} more" if manifest.skipped > 5 else ""
        echo(f"{manifest.skipped:,} rows were skipped: {first}{more}.")
    size = f"{manifest.dimension} dimensions in {manifest.precision}"
    echo(f"{manifest.rows:,} vectors of {size}, in {shards:,} shard{'' if shards == 1 else 's'}.")
    echo(f"The vectors are in {out}.")


@_command(app, "Example:  minibert evaluate runs/tinybert/3-embed questions.parquet --limit 1500 --json")
def evaluate(
    model: Model,
    data: Annotated[str, Argument(help=f"{_DATA}, or folder with a file per split.")],
    split: Annotated[str | None, Option(help="Split to measure on; the default is validation.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Number of queries or rows to measure on.")] = None,
    task: Annotated[str | None, Option(help="retrieval, triplets, similarity, classification or clustering.")] = None,
    columns: Annotated[list[str] | None, Option("--column", metavar="USE=NAME", help="Name a column; repeatable.")] = None,
    baselines: Annotated[bool, Option(help="Compare with BM25 and the untrained model.")] = True,
    batch_size: Annotated[int, Option(min=1, help="Texts in a batch.")] = 64,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model on labelled data. The columns of the data, or --task, decide what is measured.

    Columns: query and answer (or a folder in BEIR's layout) for retrieval; anchor, positive and
    negative for triplets; sentence1, sentence2 and score for similarity; text and label for
    classes, with a head or a linear probe, and for clustering; tokens and ner_tags for a tagger.
    """
    from minibert.evaluation.evaluate import evaluate as measure
    from minibert.evaluation.evaluate import metrics_table

    _silence_libraries()
    named = {use: name for use, _, name in (pair.partition("=") for pair in columns or [])}
    options: dict[str, Any] = {
        **{"split": split, "limit": limit, "task": task, "columns": named},
        **{"baselines": baselines, "batch_size": batch_size, "trust_remote_code": trust_remote_code},
    }
    result = measure(model, data, **options, show_progress=sys.stderr.isatty())
    if as_json:
        print_json({"model": model, "data": data, **result})
    else:
        echo(metrics_table(result))


@_command(
    app,
    "Example:  minibert predict runs/ner/2-tag articles.txt --out entities.jsonl",
    interrupted="The file of --out was not written.",
)
def predict(
    model: Model,
    data: Annotated[str, Argument(metavar="FILE", help=f"{_DATA}, folder, or - for lines of standard input.")],
    out: Annotated[Path | None, Option(metavar="FILE", help="File (.jsonl, .csv, .parquet) to write.")] = None,
    columns: Annotated[list[str] | None, Option("--column", help="Column to read; twice for pairs.")] = None,
    split: Split = "train",
    threshold: Annotated[float, Option(help="Lowest probability of one of several labels.")] = 0.5,
    batch_size: Annotated[int, Option(help="Texts in a batch.")] = 64,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object per row.")] = False,
) -> None:
    """Predict labels, numbers, tags, answers or choices. The model's head decides which.

    A classifier reads texts or pairs of texts. A tagger reads texts or lists of words (tokens).
    Question answering reads question and context. Multiple choice reads question and choices.
    """
    from minibert.inference.predict import check_output, in_a_line, write
    from minibert.inference.predict import predict as predict_rows

    if out is not None:
        check_output(out, force=force)
    _silence_libraries()
    predictions = predict_rows(
        model,
        data,
        columns=columns,
        split=split,
        batch_size=batch_size,
        threshold=threshold,
        trust_remote_code=trust_remote_code,
        show_progress=sys.stderr.isatty(),
    )
    if out is not None:
        echo(f"{write(predictions, out, force=force):,} rows are in {out}.", err=True)
        return
    for row in predictions:
        echo(json.dumps(row, ensure_ascii=False) if as_json else in_a_line(row))


hub = typer.Typer(help="Convert models of the BERT family to MiniBERT, and back; publish, fetch and check models.", **_PLAIN)
app.add_typer(hub, name="hub")


def _report(report: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(report))
        return
    echo(f"{report.source} is now a {report.architecture} in {report.output}")
    echo(f"{report.tensors} tensors with {report.parameters:,} parameters")
    if report.unused:
        echo(f"not used by this model: {', '.join(report.unused)}")
    for name, difference in report.differences.items():
        echo(f"largest difference of {name}: {difference:.1e}")
    if report.cosine_int8 is not None:
        echo("cosine of int8 with the exact vectors: {lowest:.4f} at least, {mean:.4f} on average".format(**report.cosine_int8))


@_command(hub, "Example:  minibert hub convert sentence-transformers/all-MiniLM-L6-v2 minilm")
def convert(
    source: Annotated[str, Argument(help="Folder of a BERT-family model, or its id on the Hub.")],
    output_dir: NewModel,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Convert a BERT, DistilBERT, RoBERTa, XLM-RoBERTa or CamemBERT model into a MiniBERT.

    The source and the MiniBERT then encode built-in texts. If their outputs differ by more than
    1e-4, the MiniBERT is deleted and the exit status is 1.
    """
    from minibert.hub.convert import convert as convert_model

    _report(convert_model(source, output_dir, dtype=dtype, revision=revision), as_json)


@_command(hub, "Example:  minibert hub export minilm minilm-bert --to bert")
def export(
    model: Annotated[str, Argument(help="Folder of a MiniBERT, or its id on the Hub.")],
    output_dir: NewModel,
    to: Annotated[str, Option(help="bert: its family in transformers; onnx: for onnxruntime.")] = "bert",
    quantize: Annotated[str | None, Option(help="int8: a second, smaller graph. Only with onnx.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Export a MiniBERT as a BERT or ONNX model, which opens without this package.

    The MiniBERT and the exported model then encode built-in texts. If their outputs differ by
    more than 1e-4, the exported model is deleted and the exit status is 1.
    """
    if to not in ("bert", "onnx"):
        raise ValueError(f"--to={to} is unknown; use bert or onnx.")
    if to == "onnx":
        from minibert.hub.onnx import export_onnx

        _report(export_onnx(model, output_dir, quantize=quantize, revision=revision), as_json)
        return
    if quantize is not None:
        raise ValueError(f"--quantize={quantize} is only possible with --to onnx; add --to onnx, or leave out --quantize.")
    from minibert.hub.export import export as export_model

    _report(export_model(model, output_dir, revision=revision), as_json)


@_command(
    hub,
    "Example:  minibert hub push runs/tinybert ann/tinybert --private --license mit --language en",
    interrupted="What was sent is kept; push again to complete it.",
)
def push(
    model: Annotated[str, Argument(help="Folder of a run (its last model), a stage or a model.")],
    repo_id: Annotated[str, Argument(metavar="USER/NAME", help="Name on the Hub.")],
    private: Annotated[bool, Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, Option(metavar="BRANCH", help="Branch to write to; the default is main.")] = None,
    create_pr: Annotated[bool, Option("--create-pr", help="Propose the model as a pull request.")] = False,
    dtype: Dtype = None,
    as_bert: Annotated[bool, Option("--as-bert", help="Publish a BERT, without code.")] = False,
    max_shard_size: Annotated[str, Option(help="Size of the largest file of weights.")] = "5GB",
    licence: Annotated[str | None, Option("--license", help="Licence for the card, such as mit.")] = None,
    languages: Annotated[list[str] | None, Option("--language", help="Language for the card, such as en; repeatable.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Build and check the model; send nothing.")] = False,
    force: Annotated[bool, Option("--force", help="Replace files in the repository.")] = False,
    as_json: Json = False,
) -> None:
    """Publish a model on the Hub, and check the model before and after the upload.

    The command builds a folder with model card and code, and opens the model in a fresh process
    without this package. It uploads the folder in one commit, downloads the commit and opens
    the model again. If the outputs differ, the exit status is 1.
    """
    from rich.filesize import decimal

    from minibert.hub.push import push as push_model

    card: dict[str, Any] = {key: value for key, value in (("license", licence), ("language", languages)) if value}
    done = push_model(
        model,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dtype=dtype,
        as_bert=as_bert,
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        force=force,
        report=lambda text: echo(text, err=True),
        **card,
    )
    if as_json:
        print_json(asdict(done))
        return
    if done.commit is None:  # a dry run
        for path, size in done.files.items():
            echo(f"{decimal(size):>12}  {printable(path, kept='')}")
        echo(f"\n{done.card}")
    for change in done.changes:
        echo(change.text)
    echo(f"opened without minibert: {', '.join(done.opened)}; largest difference {done.difference:.1e}")
    if done.commit is not None:
        echo(f"{done.repo_id} is at commit {done.commit}")
    if done.pull_request:
        echo(f"pull request: {done.pull_request}")


@_command(
    hub,
    "Example:  minibert hub pull ann/tinybert@v1 tinybert",
    interrupted="What has arrived is kept; pull again to complete it.",
)
def pull(
    name: Annotated[str, Argument(metavar="USER/NAME[@REVISION]", help="Model, and branch, tag or commit.")],
    output_dir: NewModel,
    as_json: Json = False,
) -> None:
    """Download one commit of a model, and print hashes of the model's code. No code is run."""
    from rich.filesize import decimal

    from minibert.hub.pull import pull as pull_model

    done = pull_model(name, output_dir)
    if as_json:
        print_json(asdict(done))
        return
    echo(f"{done.repo_id} at commit {done.commit} is in {done.output}")
    echo(f"{len(done.files)} files, {decimal(sum(done.files.values()))}")
    for path, digest in done.code.items():
        echo(f"sha256 {digest}  {printable(path, kept='')}")
    changed = "its code is not that of the installed minibert; minibert hub verify shows the differences"
    echo({"installed": "its code is that of the installed minibert", "none": "it has no code"}.get(done.code_is, changed))
    if done.left_out:
        echo(f"left out: {printable(', '.join(done.left_out), kept='')}")


@_command(hub, "Example:  minibert hub verify ann/tinybert@v1 --json")
def verify(
    model: Annotated[str, Argument(metavar="FOLDER|USER/NAME[@REVISION]", help="Model to check.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Check a model's files, weights, code and card, and open the model without this package.

    If a check fails, the exit status is 1.
    """
    from minibert.hub.verify import verify as verify_model

    _silence_libraries()
    found = verify_model(model, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(asdict(found))
    else:
        if found.commit:
            echo(f"{model} is at commit {found.commit}")
        for check in found.checks:
            echo(f"{check.state:7}  {check.name}: {check.text}")
            if check.detail:
                echo(check.detail)
    if not found.ok:
        raise typer.Exit(1)


plot = typer.Typer(
    help="Draw attention, embeddings, training and similarities as a page (.html) or an image (.png); list tokens.",
    **_PLAIN,
)
app.add_typer(plot, name="plot")

PlotFile = Annotated[Path, Option("--out", metavar="FILE", help="Page (.html) or image (.png) to write.")]
TextColumn = Annotated[str | None, Option(help="Column of texts, where a file has several.")]


def _draw(out: Path, force: bool, draw: Callable[[], Any]) -> None:
    """Save the picture that ``draw`` returns. Check ``out`` first."""
    from minibert.inference.predict import check_output
    from minibert.plot.page import SUFFIXES

    _silence_libraries()
    check_output(out, SUFFIXES, force=force)
    picture = draw()
    for note in picture.notes:
        echo(note, err=True)
    echo(f"The picture is in {picture.save(out, force=force)}.", err=True)


@_command(plot, 'Example:  minibert plot attention minilm "The cat sat on the mat because it was tired." --out cat.html')
def attention(
    model: Model,
    text: Annotated[str, Argument(help="Text that the model reads.")],
    out: PlotFile,
    second: Annotated[str | None, Argument(metavar="[SECOND TEXT]", help="Second text of a pair.")] = None,
    layer: Annotated[int | None, Option(help="Only this layer, from 1.")] = None,
    head: Annotated[int | None, Option(help="Only this head, from 1.")] = None,
    max_tokens: Annotated[int | None, Option(help="Tokens to read; the default is the model's limit.")] = None,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Draw the attention between tokens in every layer and head, as heat maps and as lines.

    A page (.html) has menus for layer and head. An image (.png) shows small pictures of all
    heads, or one head with its tokens.
    """
    from minibert import plot

    options: dict[str, Any] = {"layer": layer, "head": head, "max_tokens": max_tokens, "trust_remote_code": trust_remote_code}
    _draw(out, force, lambda: plot.attention(model, text, second, **options))


@_command(plot, "Example:  minibert plot embeddings minilm reviews.csv --label-column stars --out reviews.html")
def embeddings(
    model: Model,
    texts: Annotated[list[str], Argument(metavar="TEXTS...", help="A file or Hub data set, or texts.")],
    out: PlotFile,
    column: TextColumn = None,
    label_column: Annotated[str | None, Option(help="Column for colours; the default is label.")] = None,
    labels: Annotated[list[str] | None, Option("--label", help="Label of a text; repeat it for each text.")] = None,
    split: Split = "train",
    tokens: Annotated[bool, Option("--tokens", help="Show tokens, before and after the encoder.")] = False,
    method: Annotated[str, Option(help="Projection to three dimensions: pca, tsne or umap.")] = "pca",
    limit: Limit = 1000,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Draw texts, or their tokens, as points in three dimensions."""
    from minibert import plot

    options: dict[str, Any] = {"tokens": tokens, "method": method, "trust_remote_code": trust_remote_code}

    def draw() -> plot.Picture:
        read, found = plot.read_texts(texts, column=column, label_column=label_column, split=split, limit=limit)
        return plot.embeddings(model, read, labels=labels or found, **options)

    _draw(out, force, draw)


@_command(plot, "Example:  minibert plot training runs/nano_imdb runs/mine --out curves.html")
def training(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Folder of a run or a stage, or a log.jsonl.")],
    out: PlotFile,
    force: Force = False,
) -> None:
    """Draw loss, metrics, learning rate and speed of finished or running training runs."""
    from minibert import plot

    _draw(out, force, lambda: plot.training(runs))


@_command(plot, 'Example:  minibert plot similarity minilm questions.txt "how do I sort a list" --out similar.html')
def similarity(
    model: Model,
    first: Annotated[str, Argument(metavar="A", help="A file or Hub data set of texts, or a text.")],
    out: PlotFile,
    second: Annotated[str | None, Argument(metavar="[B]", help="Likewise; unset compares A with itself.")] = None,
    column: TextColumn = None,
    split: Split = "train",
    limit: Limit = 50,
    force: Force = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Draw the similarity between each text in A and each text in B."""
    from minibert import plot

    def draw() -> plot.Picture:
        given = [data for data in (first, second) if data is not None]
        lists = [plot.read_texts([data], column=column, split=split, limit=limit)[0] for data in given]
        return plot.similarity(model, *lists, trust_remote_code=trust_remote_code)

    _draw(out, force, draw)


@_command(plot, 'Example:  minibert plot tokens minilm "Tokenization, unbelievably."')
def tokens(
    model: Model,
    text: Annotated[str, Argument(help="Text to split.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Print the tokens of a text with their ids and words, and mark unknown words."""
    from minibert import plot

    _silence_libraries()
    found = plot.tokens(model, text, trust_remote_code=trust_remote_code)
    if as_json:
        print_json({"model": model, "text": text, "tokens": [asdict(token) for token in found.tokens]})
    else:
        echo(found)


_EXAMPLE_QUESTIONS = (
    "read a table from a comma separated file",
    "compute the inverse of a matrix",
    "run a function in several processes at the same time",
)


@_command(
    app,
    'Example:  minibert quickstart --query "how do I sort an array"',
    interrupted=_RESUME,
    extra="train",
)
def quickstart(
    overrides: Overrides = None,
    queries: Annotated[list[str] | None, Option("--query", help="Question; without it, the command asks.")] = None,
    output_dir: RunFolder = None,
    force: RunAgain = False,
) -> None:
    """Train a search model on docstrings of installed Python packages, and try the model.

    The command runs the bundled recipe quickstart, measures the model and opens it in a fresh
    process. It takes some minutes on two CPU cores. Nothing is downloaded. When you run it
    again, finished stages are skipped.
    """
    from dataclasses import replace

    from minibert.data.docstrings import load_passages
    from minibert.evaluation.evaluate import metrics_table
    from minibert.hub.isolated import compute
    from minibert.hub.push import prove
    from minibert.hub.verify import request_for
    from minibert.inference.load import weight_arguments
    from minibert.search.search import Searcher, check_queries
    from minibert.train.recipe import load_recipe
    from minibert.train.run import read_metrics, run_recipe

    _name_foreign()
    check_queries(queries or [])
    _report_progress()
    run_dir = run_recipe(load_recipe("quickstart", overrides or []), output_dir=output_dir, force=force)
    folder = run_dir / "2-embed"
    echo("\nHeld-out modules, each summary against all descriptions:")
    for metrics in read_metrics(run_dir)["evaluate"].values():
        echo(metrics_table(metrics))

    questions = [*_EXAMPLE_QUESTIONS, *(queries or [])]
    passages = load_passages()["text"]
    echo(f"\nReading {len(passages):,} passages to search ...", err=True)
    searcher = Searcher(folder, passages, show_progress=True)
    request = request_for(folder)
    here, _ = compute(replace(request, arguments=weight_arguments(False)))  # here the installed classes open the model
    _, difference = prove(request, here, str(folder))
    echo(f"\nReloaded by sentence-transformers in a fresh process: vectors differ by at most {difference:.1e}.")
    for question, hits in zip(questions, searcher.search(questions, top_k=3), strict=True):
        echo(f"\n{_in_lines(question, hits)}", nl=False)
    echo(f"\nThe model is in {folder}. Search your own text: minibert search {folder} --passages FILE")
    for query in _typed_queries() if not queries and sys.stdin.isatty() else ():
        echo(_in_lines(query, searcher.search([query], top_k=3)[0]))
