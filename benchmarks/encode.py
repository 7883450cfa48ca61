"""Compare encoding on one machine, in one run: MiniBERT and sentence-transformers on its PyTorch, ONNX and OpenVINO backends.

All systems encode the same texts in turn, several times over, and the first round is not counted. The ONNX and OpenVINO
backends need older libraries than ours: they run from an environment of their own, which the first run creates.
"""

import json
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from benchmarks.machine import describe
from minibert import MiniBertConfig, MiniBertModel
from minibert.data.docstrings import load_pairs
from minibert.hub.convert import convert
from minibert.hub.export import export
from minibert.inference.encode import Encoder
from minibert.search.search import read_passages

PEERS = Path(__file__).parent / "peers.txt"
BACKENDS = ("onnx", "onnx-int8", "openvino")
_TORCH = "sentence-transformers, BertModel, "
_OURS = "SentenceTransformer.encode, MiniBERT, "
REFERENCE = _TORCH + "float32"


def peer_python(work: Path) -> Path:
    """Return the interpreter of the environment of ``peers.txt``, which is made once."""
    python = work / "peers" / "bin" / "python"
    if not (work / "peers" / "complete").exists():
        print(f"creating the environment of {PEERS.name} in {work / 'peers'} ...", flush=True)
        venv.create(work / "peers", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", PEERS], check=True)
        (work / "peers" / "complete").touch()
    return python


class Peers:
    """The backends in the other environment, asked one at a time over a pipe."""

    def __init__(self, model: Path, work: Path, graphs: Path) -> None:
        python = peer_python(work)
        script = Path(__file__).with_name("peer.py")
        self._process = subprocess.Popen(
            [python, script, model.resolve(), graphs.resolve()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"The peer stopped while asked {question}; its error stands above.")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run(
    model: Path,
    out: Path,
    work: Path,
    *,
    shape: tuple[int, int] | None,
    texts: Path | None,
    limit: int,
    batch_size: int,
    repeats: int,
    peers: bool,
) -> None:
    """Measure every system ``repeats`` times, print a table and write ``out``."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if shape is not None:
        model = _reshaped(model, shape, work)
    folder = work / model.name
    folder.mkdir(parents=True, exist_ok=True)
    passages = read_texts(texts, limit)
    results = {"benchmark": "encode", "machine": describe(), "model": model.name, "texts": _describe(model, passages)}
    results |= {"batch_size": batch_size, "repeats": repeats}
    systems = _our_systems(model, folder, batch_size)
    other = Peers(model, work, folder) if peers else None
    if other is not None:
        results["peers"] = other.ask(versions=True)["versions"]
        for backend in BACKENDS:
            other.ask(open=backend)
            systems[f"sentence-transformers, {backend}"] = _peer(other, backend, folder, passages, batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    vectors: dict[str, np.ndarray] = {}
    for number in range(repeats + 1):
        for name, system in systems.items():
            took, vectors[name] = system(passages)
            if number:
                seconds[name].append(took)
        for dtype, found in rates.items():
            found.append(product_rate(results["texts"]["width"], getattr(torch, dtype)))
    if other is not None:
        other.close()
    results["product_gflops"] = {dtype: round(statistics.median(found[1:]), 1) for dtype, found in rates.items()}
    results["systems"] = _rows(seconds, vectors, results["texts"], max(results["product_gflops"].values()))
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _table(results)


def read_texts(file: Path | None, limit: int) -> list[str]:
    """Texts of ``file``, or summaries and descriptions of the documentation installed here, which training never saw."""
    if file is not None:
        return read_passages(file)[:limit]
    pairs = load_pairs("validation")
    return [text for pair in zip(pairs["query"], pairs["answer"], strict=True) for text in pair][:limit]


def _describe(model: Path, passages: list[str]) -> dict[str, Any]:
    opened = SentenceTransformer(str(model), device="cpu")
    assert opened.tokenizer is not None
    lengths = np.array(
        [len(ids) for ids in opened.tokenizer(passages, truncation=True, max_length=opened.max_seq_length)["input_ids"]]
    )
    config = opened[0].auto_model.config
    width, inner = config.hidden_size, config.intermediate_size
    # Products with the matrices of a layer, and of attention's scores and sums: 2 operations per number and token.
    operations = config.num_hidden_layers * float(
        (lengths * 2 * (4 * width**2 + 2 * width * inner)).sum() + (lengths.astype(float) ** 2 * 4 * width).sum()
    )
    return {
        "number": len(passages),
        "tokens": int(lengths.sum()),
        "mean_tokens": round(float(lengths.mean()), 1),
        "width": width,
        "useful_gflop": round(operations / 1e9, 1),
    }


def _reshaped(model: Path, shape: tuple[int, int], work: Path) -> Path:
    """Folder of a BertModel with this number of layers and this width, with new weights and the tokenizer of ``model``."""
    layers, width = shape
    folder = work / f"{layers}x{width}"
    if not folder.exists():
        opened = SentenceTransformer(str(model), device="cpu")
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
        sizes |= {"intermediate_size": 4 * width, "vocab_size": len(opened.tokenizer)}
        config = MiniBertConfig.preset("bert-base", **sizes, pooling="mean")
        bert = new_bert(config, opened.tokenizer, work / f"{folder.name}-new")
        bert.max_seq_length = opened.max_seq_length
        bert.save(str(folder), create_model_card=False)
        # In the words that the older library of the peers knows too.
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        listed = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
            for number, (path, name) in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
        pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


def new_bert(config: MiniBertConfig, tokenizer: Any, folder: Path, **options: Any) -> SentenceTransformer:
    """Return a BertModel with new weights and mean pooling, and write a MiniBERT with the same weights into ``folder``.

    ``options`` are fields of transformers' BertConfig.
    """
    if not (folder / "bert").exists():
        torch.manual_seed(0)
        MiniBertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        export(folder, folder / "bert")
    bert = Transformer(str(folder / "bert"), model_kwargs=options)
    modules = [bert, Pooling(config.hidden_size, pooling_mode="mean"), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


def _our_systems(model: Path, work: Path, batch_size: int) -> dict[str, Callable[[list[str]], tuple[float, np.ndarray]]]:
    def through(opened: SentenceTransformer) -> Callable[[list[str]], tuple[float, np.ndarray]]:
        return lambda texts: _timed(lambda: opened.encode(texts, batch_size=batch_size, show_progress_bar=False))

    systems = {}
    for dtype in ("float32", "bfloat16"):
        folder = work / f"minibert-{dtype}"
        if not folder.exists():
            convert(str(model), folder, dtype=dtype)
        kwargs = {"dtype": dtype}
        systems[_TORCH + dtype] = through(SentenceTransformer(str(model), device="cpu", model_kwargs=kwargs))
        systems[_OURS + dtype] = through(SentenceTransformer(str(folder), device="cpu", model_kwargs=kwargs))
    for dtype in ("float32", "auto"):
        encoder = Encoder(work / "minibert-float32", dtype=dtype, device="cpu")
        systems[f"minibert.encode, {dtype}"] = lambda texts, encoder=encoder: _timed(lambda: encoder.encode(texts))
    return systems


def _timed(encode: Callable[[], Any]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    vectors = encode()
    return time.perf_counter() - started, np.asarray(vectors, dtype=np.float32)


def _peer(peers: Peers, backend: str, work: Path, passages: list[str], batch_size: int):
    given, answer = work / "texts.json", work / f"{backend}.npy"
    given.write_text(json.dumps(passages), encoding="utf-8")

    def system(texts: list[str]) -> tuple[float, np.ndarray]:
        took = peers.ask(encode=backend, texts=str(given), vectors=str(answer), batch_size=batch_size)["seconds"]
        return took, np.load(answer)

    return system


def product_rate(width: int, dtype: torch.dtype) -> float:
    """Billion operations per second of the product that a layer's first MLP matrix is, for 4,096 tokens."""
    states, weight = torch.randn(4096, width).to(dtype), torch.randn(4 * width, width).to(dtype)
    with torch.inference_mode():
        for _ in range(3):
            F.linear(states, weight)
        started = time.perf_counter()
        for _ in range(30):
            F.linear(states, weight)
        took = time.perf_counter() - started
    return 30 * 2 * 4096 * 4 * width**2 / took / 1e9


def _rows(
    seconds: dict[str, list[float]], vectors: dict[str, np.ndarray], texts: dict[str, Any], rate: float
) -> dict[str, dict[str, float]]:
    rows = {}
    exact = vectors[REFERENCE] / np.linalg.norm(vectors[REFERENCE], axis=1, keepdims=True)
    for name, times in seconds.items():
        cosines = (vectors[name] * exact).sum(axis=1) / np.linalg.norm(vectors[name], axis=1)
        median = statistics.median(times)
        ratios = [theirs / ours for ours, theirs in zip(times, seconds[REFERENCE], strict=True)]
        rows[name] = {
            "texts_per_second": round(texts["number"] / median, 1),
            "slowest_and_fastest": [round(texts["number"] / took, 1) for took in (max(times), min(times))],
            "times_as_fast": round(statistics.median(ratios), 2),
            "share_of_product_rate": round(texts["useful_gflop"] / median / rate, 3),
            "cosine_worst": round(float(cosines.min()), 6),
            "cosine_mean": round(float(cosines.mean()), 6),
        }
    return rows


def _table(results: dict[str, Any]) -> None:
    texts = results["texts"]
    print(f"{texts['number']} texts, mean {texts['mean_tokens']} tokens; {results['machine']['processor']}, ", end="")
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in results["product_gflops"].items())
    print(f"{results['machine']['threads']} threads; product rate {rates}, the faster of which shares refer to")
    print(f"{'':52}{'texts/s':>9}{'slowest':>9}{'fastest':>9}{'times':>7}{'of rate':>9}{'cos worst':>11}{'mean':>10}")
    for name, row in results["systems"].items():
        low, high = row["slowest_and_fastest"]
        print(
            f"{name:52}{row['texts_per_second']:9.1f}{low:9.1f}{high:9.1f}{row['times_as_fast']:7.2f}"
            f"{row['share_of_product_rate']:9.1%}{row['cosine_worst']:11.6f}{row['cosine_mean']:10.6f}"
        )
    sys.stdout.flush()


def draw(results: Path, out: Path) -> None:
    """A bar for each system of a JSON file written by :func:`run`, as PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(results.read_text(encoding="utf-8"))
    rows = sorted(found["systems"].items(), key=lambda row: row[1]["texts_per_second"])
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    names = [name for name, _ in rows]
    speeds = [row["texts_per_second"] for _, row in rows]
    bars = axes.barh(names, speeds, color=["#2f6db5" if "inibert" in name.lower() else "#b8bec6" for name in names])
    axes.bar_label(bars, labels=[f"{speed:.0f}" for speed in speeds], padding=3)
    machine, texts = found["machine"], found["texts"]
    axes.set_xlabel(f"texts per second ({texts['number']} texts, mean {texts['mean_tokens']} tokens)")
    axes.set_title(f"{found['model']} on {machine['threads']} threads of {machine['processor']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    figure.savefig(out, dpi=150)
    plt.close(figure)
