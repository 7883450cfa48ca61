"""Prepare the texts of ``recipes/pocket.yaml``, and measure what its student keeps of the teacher.

The texts are those of the training splits of ``SETS``. Left out are texts of a validation or test split, pages whose title
stands in such a split, and passages of pages that share ``RUN`` words in a row with a text that is measured. Nothing of
``UNSEEN`` is trained on: these sets choose the shape, the texts and the schedule. The other measurements are for the end.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from benchmarks.distil import seconds_in_turns
from benchmarks.machine import describe
from benchmarks.train import RETRIEVAL
from minibert.data.load import load as load_data
from minibert.data.source import DataSource
from minibert.evaluation.evaluate import evaluate
from minibert.inference.load import load

PAIR = ("query", "answer")
SENTENCES = ("premise", "hypothesis")
# Data set -> its columns of texts.
SETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("natural_questions_qed", "squad_sentences", "medquad", "covid_qa", "stackfaq", "scitldr"), PAIR),
    **dict.fromkeys(("tldr_pages", "wiki_sections", "wiki_leads"), PAIR),
    "pubmedqa": (*PAIR, "long_answer"),
    **dict.fromkeys(("nli_new_protocols", "nli_cad"), SENTENCES),
    "stsb": ("sentence1", "sentence2"),
    **dict.fromkeys(("wiki_text", "english_novels"), ("text",)),
}
# Sets of pages -> the column of a page's title. The texts of the last two are cut into lines, of which some are drawn.
PAGES = {"wiki_sections": "title", "wiki_leads": "query", "wiki_text": "title", "english_novels": "title"}
LONG = ("wiki_text", "english_novels")
# Data set -> the split that is measured. None of these sets is trained on.
UNSEEN = {"wikiqa": "validation", "trecqa": "validation", "reuters_titles": "validation", "covid_faq": "train"}
QUERIES = 1000
RUN = 13
SHORTEST = 40  # characters of a line; shorter ones are mostly remains of lists and dialogue


class HeldOut:
    """Texts, titles and runs of words that may not be trained on. Case and punctuation do not count.

    >>> held_out = HeldOut()
    >>> held_out.add("Who wrote 'Emma'?", run=False)
    >>> held_out.has("who wrote emma"), held_out.has("who wrote")
    (True, False)
    """

    def __init__(self) -> None:
        self.texts: set[str] = set()
        self.titles: set[str] = set()
        self.runs: set[int] = set()

    @classmethod
    def of(cls, data: Path) -> "HeldOut":
        """Read the validation and test splits of all data sets in ``data``, and all splits of ``UNSEEN``."""
        found, measured = cls(), {*UNSEEN, *RETRIEVAL, "stsb"}
        for file in sorted(data.glob("*/*.parquet")):
            name = file.parent.name
            if not file.stem.startswith(("validation", "test")) and name not in UNSEEN:
                continue
            rows = Dataset.from_parquet(str(file))
            for column, feature in rows.features.items():
                if getattr(feature, "dtype", None) != "string":
                    continue
                for text in rows[column]:
                    if column == "title":
                        found.titles.add(plain(text or ""))
                    else:
                        found.add(text or "", run=name in measured)
        return found

    def add(self, text: str, *, run: bool) -> None:
        """Hold out ``text``, each of its lines, and with ``run`` all runs of words."""
        self.texts |= {plain(part) for part in (text, *text.splitlines())} - {""}
        if run:
            self.runs.update(runs_of(text))

    def has(self, text: str) -> bool:
        return plain(text) in self.texts

    def shares_words(self, text: str) -> bool:
        return not self.runs.isdisjoint(runs_of(text))


def plain(text: str) -> str:
    """Return the lower-case words of ``text``, separated by spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def runs_of(text: str) -> Iterator[int]:
    """Yield a hash of each run of ``RUN`` words."""
    words = plain(text).split()
    return (hash(tuple(words[start : start + RUN])) for start in range(len(words) - RUN + 1))


def texts_of(data: Path, name: str, held_out: HeldOut, dropped: Counter[str]) -> Iterator[str]:
    """Yield the texts of a training split that may be trained on, and count the others in ``dropped`` by their reason."""
    rows = load_data([DataSource(path=str(data / name), split="train")])
    titles: Iterable[str] = rows[PAGES[name]] if name in PAGES else [""] * len(rows)
    for title, *texts in zip(titles, *(rows[column] for column in SETS[name]), strict=True):
        if title and plain(title) in held_out.titles:
            dropped["title"] += 1
            continue
        for text in texts:
            for part in text.splitlines() if name in LONG else [text]:
                part = part.strip()
                if len(part) < (SHORTEST if name in LONG else 1):
                    continue
                reason = "text" if held_out.has(part) else "words" if name in PAGES and held_out.shares_words(part) else None
                if reason:
                    dropped[reason] += 1
                else:
                    yield part


def prepare(data: Path, out: Path, *, lines: Sequence[int], seed: int = 0) -> None:
    """Write the distinct texts of all sets to the Parquet file ``out``, and what was left out next to it as JSON.

    ``lines`` has the number of lines to draw from each set of ``LONG``.
    """
    held_out, rng = HeldOut.of(data), np.random.default_rng(seed)
    texts: dict[str, str] = {}
    report: dict[str, dict[str, int]] = {}
    for name in SETS:
        dropped: Counter[str] = Counter()
        found = [text for text in dict.fromkeys(texts_of(data, name, held_out, dropped)) if text not in texts]
        if name in LONG and (limit := lines[LONG.index(name)]) < len(found):
            found = [found[number] for number in np.sort(rng.permutation(len(found))[:limit])]
        texts |= dict.fromkeys(found, name)
        report[name] = {"texts": len(found), **{f"left out by {reason}": count for reason, count in sorted(dropped.items())}}
        print(name, report[name], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"text": list(texts)}).to_parquet(str(out))
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(texts):,} texts in {out}.")


def run(data: Path, teacher: Path, students: list[Path], out: Path, *, final: bool, limit: int, repeats: int) -> None:
    """Measure ``teacher`` and ``students``, and write ``out``. ``final`` reads all that must not choose a student."""
    transformers.logging.set_verbosity_error()
    opened = [load(folder, device="cpu") for folder in (teacher, *students)]
    rows: list[dict[str, Any]] = [measure(data, model, final=final) for model in opened]
    for folder, model, row in zip((teacher, *students), opened, rows, strict=True):
        row |= {f"{name}_kept": value / rows[0][name] for name, value in row.items()}
        row |= {"model": folder.name, "parameters": sum(parameter.numel() for parameter in model.parameters())}
        if final:
            row |= across(data, model, opened[0], rows[0])
    if final:
        splits = [load_data([DataSource(path=str(data / name), split="validation")]) for name in RETRIEVAL]
        texts = [text for split in splits for column in PAIR for text in split[column][: limit // (2 * len(splits))]]
        seconds = seconds_in_turns([teacher, *students], texts, repeats)
        for row, taken in zip(rows, seconds, strict=True):
            row["seconds"] = taken
            row["speed_of_teacher"] = statistics.median(a / b for a, b in zip(seconds[0], taken, strict=True))
    options = {"queries": QUERIES, "texts": limit, "repeats": repeats, "final": final}
    results = {"benchmark": "pocket", "machine": describe(), "options": options, "models": rows}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row["model"], f"{row['parameters']:,} parameters")
        for name, value in row.items():
            if isinstance(value, float):
                print(f"  {name:44}{value:8.4f}")


def measure(data: Path, model: SentenceTransformer, *, final: bool) -> dict[str, float]:
    """Return nDCG@10 on ``UNSEEN`` and its mean. With ``final``, also on ``RETRIEVAL``, and Spearman's on STS-B."""
    found = {name: ndcg(data, name, split, model) for name, split in UNSEEN.items()}
    found["unseen"] = statistics.mean(found.values())
    if final:
        trained = {name: ndcg(data, name, "validation", model) for name in RETRIEVAL}
        pairs = load_data([DataSource(path=str(data / "stsb"), split="validation")])
        spearman = evaluate(model, pairs, baselines=False)["systems"]["model"]["spearman"]
        found |= trained | {"retrieval": statistics.mean(trained.values()), "stsb": spearman}
    return found


def across(
    data: Path, student: SentenceTransformer, teacher: SentenceTransformer, of_teacher: dict[str, float]
) -> dict[str, float]:
    """Return nDCG@10 of the student's queries among the teacher's passages, and the share of the teacher's own."""
    encode_document = student.encode_document
    student.encode_document = teacher.encode_document  # type: ignore[method-assign]
    found = {name: ndcg(data, name, "validation", student) for name in RETRIEVAL}
    student.encode_document = encode_document  # type: ignore[method-assign]
    found["retrieval"] = statistics.mean(found.values())
    kept = {f"{name}_to_teacher_kept": value / of_teacher[name] for name, value in found.items()}
    return {f"{name}_to_teacher": value for name, value in found.items()} | kept


def ndcg(data: Path, name: str, split: str, model: SentenceTransformer) -> float:
    """Return nDCG@10 of the first ``QUERIES`` queries of a split, in the order of the file, among all its distinct answers."""
    rows = load_data([DataSource(path=str(data / name), split=split)])
    value: float = evaluate(model, rows, limit=QUERIES, baselines=False)["systems"]["model"]["ndcg@10"]
    return value


__all__ = ["HeldOut", "prepare", "run"]
