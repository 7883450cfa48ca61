"""Measure search among many vectors: times and recall of the index, of exact search and of a graph (HNSW).

All are FAISS on the same vectors and threads. What BM25 adds to the ranking by meaning is measured on labelled questions.
"""

import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from benchmarks.corpus import _private
from benchmarks.machine import describe
from minibert.data.load import as_dataset
from minibert.search import index as index_module
from minibert.search.index import NEIGHBOURS, VectorIndex, index_folder, open_index
from minibert.search.search import FolderSearcher
from minibert.search.vectors import Manifest, Shard, ShardWriter, VectorFolder, shard_name, write_manifest

SHARD = 50_000
HYBRID = ("natural_questions_qed", "squad_sentences")
# Standard deviations of areas, topics, documents and passages around what they belong to, how many areas, and topics in an
# area, there are, and how fast the variance falls over the directions. Chosen so that 40,000 such vectors resemble those
# all-MiniLM-L6-v2 makes of Wikipedia, question-answering and medical passages: median cosine of the nearest neighbour 0.62
# (real: 0.61), of random pairs 0.00 ± 0.08 (0.02 ± 0.09), intrinsic dimension at 50 neighbours 20 (22), and the same share
# of an IVF index to look through for a recall of 0.99 (a quarter of 256 lists).
SCALES, AREAS, TOPICS, FALL = (0.35, 0.5, 0.5, 0.62), 64, 32, 0.3
PASSAGES_PER_DOCUMENT = 4


def run(
    out: Path,
    work: Path,
    *,
    rows: int,
    width: int,
    queries: int,
    repeats: int,
    hnsw: bool,
    data: Path | None,
    model: str | None,
) -> None:
    """Measure both parts (the second needs ``data`` and ``model``), print tables and write ``out``."""
    results: dict[str, Any] = {
        "benchmark": "search",
        "machine": {**describe(), "faiss": version("faiss-cpu"), "faiss_threads": faiss.omp_get_max_threads()},
        "options": {"rows": rows, "width": width, "queries": queries, "repeats": repeats},
    }
    parts: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if rows:
        parts.append(("scale", lambda: measure_scale(work, rows, width, queries, repeats, hnsw)))
    if data and model:
        parts.append(("hybrid", lambda: {name: measure_hybrid(data / name, model, work / name) for name in HYBRID}))
    for name, measure in parts:
        results[name] = measure()
        print(_scale_table(results[name]) if name == "scale" else _hybrid_table(results[name]), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- scale


def clustered(rows: int, width: int, total: int, seed: int) -> np.ndarray:
    """(rows, width) float32 of length 1: a random tree of areas, topics, documents and passages, of which few are popular.

    ``total`` passages in the complete corpus set the number of documents; rows of different seeds share the tree.
    """
    spectrum = np.arange(1, width + 1, dtype=np.float32) ** -FALL
    spectrum /= np.linalg.norm(spectrum)
    rng, node = np.random.default_rng(seed), np.zeros(rows, dtype=np.int64)
    vectors = SCALES[-1] * rng.standard_normal((rows, width), dtype=np.float32) * spectrum
    for level, children in enumerate((AREAS, TOPICS, max(2, total // (AREAS * TOPICS * PASSAGES_PER_DOCUMENT)))):
        node = node * children + np.minimum((rng.random(rows) ** 1.5 * children).astype(np.int64), children - 1)
        present, place = np.unique(node, return_inverse=True)
        centres = [np.random.default_rng((level, int(one))).standard_normal(width, dtype=np.float32) for one in present]
        vectors += SCALES[level] * (np.stack(centres) * spectrum)[place]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_folder(folder: Path, rows: int, width: int) -> VectorFolder:
    """A folder of such vectors; one that is there already is kept."""
    if folder.exists() and len(VectorFolder(folder)) == rows:
        shutil.rmtree(folder / "index", ignore_errors=True)
        return VectorFolder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manifest = Manifest(
        model="none",
        fingerprint="none",
        dimension=width,
        precision="float32",
        normalized=True,
        source={"generated": "clustered"},
        columns={"kept": False},
        encoding={},
        rows_per_shard=SHARD,
        complete=True,
        rows=rows,
    )
    for number, start in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - start)
        with ShardWriter(folder / shard_name(number), manifest, pa.int64()) as writer:
            writer.write(pa.array(range(start, start + count)), [], clustered(count, width, rows, number + 1))
        manifest.shards.append(Shard(shard_name(number), start, count, start, count))
    write_manifest(folder, manifest)
    return VectorFolder(folder)


def measure_scale(work: Path, rows: int, width: int, count: int, repeats: int, hnsw: bool) -> dict[str, Any]:
    """Build the index, then time it at several settings in turns with exact search in memory, and a graph."""
    index_module.EXACT_ROWS = min(index_module.EXACT_ROWS, rows - 1)  # small sizes are measured with lists as well
    folder = write_folder(work / f"clustered-{rows}-{width}", rows, width)
    queries = clustered(count, width, rows, 0)
    with peak_memory() as memory:
        started = time.perf_counter()
        index = open_index(folder, show_progress=True)
        build = {"seconds": time.perf_counter() - started}
    build |= {"peak_private_megabytes": memory[0], "bytes": sum(f.stat().st_size for f in index_folder(folder).iterdir())}
    started = time.perf_counter()
    index = open_index(folder)
    build["open_seconds"] = time.perf_counter() - started

    flat = faiss.IndexFlatIP(width)
    for _, block in index.blocks():
        flat.add(block)
    _, true = flat.search(queries, NEIGHBOURS)
    chosen = index.state.lists
    assert chosen is not None
    searches: dict[str, Callable[[np.ndarray], np.ndarray]] = {"exact": lambda asked: flat.search(asked, NEIGHBOURS)[1]}
    searches["minibert"] = lambda asked: index.search(asked, NEIGHBOURS)[1]
    for name, settings in _settings(index):
        searches[name] = lambda asked, settings=settings: index._by_lists(asked, NEIGHBOURS, settings)[1]
    graph_build = None
    if hnsw:
        graph, graph_build = _graph(index, width)
        for ef in (16, 32, 64, 128, 256, 512):
            searches[f"hnsw ef={ef}"] = lambda asked, ef=ef: _search_graph(graph, asked, ef)
    return {
        "build": build,
        "lists": asdict(chosen),
        "hnsw_build_seconds": graph_build,
        "systems": _time(searches, queries, true, repeats),
    }


def _settings(index: VectorIndex) -> Iterator[tuple[str, Any]]:
    """The chosen settings, with fewer and more probes and candidates."""
    chosen = index.state.lists
    assert chosen is not None
    for probes in sorted({max(1, chosen.probes * 2**step // 8) for step in range(7)}):
        for candidates in (4, 8, 16):
            if probes <= chosen.lists:
                yield f"probes={probes} candidates={candidates}", replace(chosen, probes=probes, candidates=candidates)


def _graph(index: VectorIndex, width: int) -> tuple[Any, float]:
    graph = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 100
    started = time.perf_counter()
    for _, block in index.blocks():
        graph.add(block)
    return graph, time.perf_counter() - started


def _search_graph(graph: Any, queries: np.ndarray, ef: int) -> np.ndarray:
    graph.hnsw.efSearch = ef
    return graph.search(queries, NEIGHBOURS)[1]


def _time(searches: dict[str, Callable[..., np.ndarray]], queries: np.ndarray, true: np.ndarray, repeats: int) -> list[Any]:
    """Recall, queries per second of a batch (median, lowest and highest of runs in turns), and the time of one query alone."""
    rates: dict[str, list[float]] = {name: [] for name in searches}
    found = {name: search(queries) for name, search in searches.items()}  # warms up, too
    for _ in range(repeats):
        for name, search in searches.items():
            started = time.perf_counter()
            search(queries)
            rates[name].append(len(queries) / (time.perf_counter() - started))
    exact = statistics.median(rates["exact"])
    systems = []
    for name, search in searches.items():
        alone = []
        for query in queries[:50]:
            started = time.perf_counter()
            search(query[None])
            alone.append(time.perf_counter() - started)
        hits = [len(set(ours) & set(theirs)) for ours, theirs in zip(found[name].tolist(), true.tolist(), strict=True)]
        rate = statistics.median(rates[name])
        systems.append(
            {
                "system": name,
                f"recall@{NEIGHBOURS}": sum(hits) / true.size,
                "queries_per_second": rate,
                "spread": [min(rates[name]), max(rates[name])],
                "times_exact": rate / exact,
                "one_query_milliseconds": 1000 * statistics.median(alone),
            }
        )
    return systems


class peak_memory:
    """Highest memory of this process that is its own (not mapped files), in MiB, as the only element of a list."""

    def __enter__(self) -> list[int]:
        self._peak, self._done = [0], threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self._peak

    def _watch(self) -> None:
        import os

        while not self._done.wait(0.2):
            self._peak[0] = max(self._peak[0], _private(os.getpid()) // 2**20)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _scale_table(result: dict[str, Any]) -> str:
    build, lists = result["build"], result["lists"]
    graph = result["hnsw_build_seconds"]
    lines = [
        f"built in {build['seconds']:.1f} s ({build['peak_private_megabytes']:,} MiB of own memory at most), opened in "
        f"{build['open_seconds']:.2f} s; chosen: {lists['probes']} of {lists['lists']} lists, {lists['candidates']} candidates "
        f"per hit, recall {lists['recall']:.4f} on stored vectors" + (f"; HNSW built in {graph:.1f} s" if graph else ""),
        f"{'':28}{'recall@10':>10}{'queries/s':>12}{'lowest':>10}{'highest':>10}{'x exact':>9}{'one (ms)':>10}",
    ]
    for row in result["systems"]:
        lines.append(
            f"{row['system']:28}{row['recall@10']:10.4f}{row['queries_per_second']:12,.0f}{row['spread'][0]:10,.0f}"
            f"{row['spread'][1]:10,.0f}{row['times_exact']:9.1f}{row['one_query_milliseconds']:10.2f}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- hybrid


def measure_hybrid(data: Path, model: str, work: Path) -> dict[str, Any]:
    """Figures of finding each question's answers among all distinct ones: by meaning, by words, and by both."""
    from minibert.inference.encode import encode
    from minibert.inference.load import find_model, fingerprint

    rows = as_dataset(data, split="validation")
    passages = list(dict.fromkeys(rows["answer"]))
    number = {passage: str(place) for place, passage in enumerate(passages)}
    relevant: dict[str, set[str]] = {}
    for query, answer in zip(rows["query"], rows["answer"], strict=True):
        relevant.setdefault(query, set()).add(number[answer])
    queries = list(relevant)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    vectors = encode(model, passages, normalize=True)
    manifest = Manifest(
        model=model,
        fingerprint=fingerprint(find_model(model)),
        dimension=vectors.shape[1],
        precision="float32",
        normalized=True,
        source={"path": str(data)},
        columns={"kept": True},
        encoding={},
        rows_per_shard=len(passages),
        complete=True,
        rows=len(passages),
        shards=[Shard(shard_name(0), 0, len(passages), 0, len(passages))],
    )
    with ShardWriter(work / shard_name(0), manifest, pa.int64()) as writer:
        writer.write(pa.array(range(len(passages))), passages, vectors)
    write_manifest(work, manifest)
    searcher = FolderSearcher(work, model, hybrid=True)
    assert searcher.words is not None
    evaluator = InformationRetrievalEvaluator(
        queries={query: query for query in queries},
        corpus=dict(zip(number.values(), passages, strict=True)),
        relevant_docs=relevant,
        precision_recall_at_k=[1, 10],
        write_csv=False,
    )
    both = searcher.search(queries, 100)
    by_words = [row[row >= 0].tolist() for row in searcher.words.search(queries, 100)[1]]
    searcher.words = None
    by_meaning = searcher.search(queries, 100)
    rankings = {
        "meaning": [[hit.number for hit in hits] for hits in by_meaning],
        "words": by_words,
        "both": [[hit.number for hit in hits] for hits in both],
    }
    systems = {name: _figures(evaluator, ranking) for name, ranking in rankings.items()}
    return {"model": model, "queries": len(queries), "passages": len(passages), "systems": systems}


def _figures(evaluator: InformationRetrievalEvaluator, rankings: list[list[int]]) -> dict[str, float]:
    hits = [[{"corpus_id": str(row), "score": 1 / rank} for rank, row in enumerate(ranking, start=1)] for ranking in rankings]
    metrics = evaluator.compute_metrics(hits)
    flat = {name.replace("@k", f"@{k}"): float(value) for name, by_k in metrics.items() for k, value in by_k.items()}
    return {name: flat[name] for name in ("recall@1", "recall@10", "mrr@10", "ndcg@10")}


def _hybrid_table(result: dict[str, Any]) -> str:
    lines = []
    for name, one in result.items():
        lines += [f"{name}: {one['queries']:,} queries, {one['passages']:,} passages, {one['model']}"]
        lines += ["".join([f"{'':12}", *(f"{figure:>12}" for figure in one["systems"]["both"])])]
        lines += [
            "".join([f"{system:12}", *(f"{value:12.4f}" for value in row.values())]) for system, row in one["systems"].items()
        ]
    return "\n".join(lines)
