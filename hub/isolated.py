"""Compute a model's outputs in a fresh process that cannot import this package.

As a script, this file reads a JSON request from standard input and opens the model. It writes
the outputs to a safetensors file.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A short text, an empty text, a longer text, several writing systems, and punctuation.
TEXTS = [
    "A short text.",
    "",
    "How do I read a table from a comma separated file, and invert the matrix that it holds?",
    "Größe, naïve, 北京市, 東京, עברית, नमस्ते, Ελλάδα, 🙂👍🏽, e\u0301 and \u200b nothing",
    'TABS\tand\nlines   -- 1,234.56 (ok?) https://example.org/a_b#c <s> [UNK] \\ "quoted"',
]
# Class -> transformers pipeline. Question answering, multiple choice and pretraining have no
# pipeline.
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
_OUTPUTS = "outputs.safetensors"
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass
class Request:
    """Describe which model to open and how.

    ``model`` is a folder, or the id of a model in the Hub's cache at the commit ``revision``. The
    ``Auto*`` classes ``heads`` open it and, if ``embeds`` is True, sentence-transformers.
    """

    model: str
    heads: list[str]
    embeds: bool
    arguments: dict[str, Any]  # of from_pretrained
    max_length: int  # of a text, in tokens
    revision: str | None = None
    transformer: str | None = None  # folder of the transformer, if it is not ``model``


def compute(request: Request) -> tuple[dict[str, Any], list[str]]:
    """Return a model's outputs by name, and the classes that opened the model."""
    import torch
    import transformers

    encoder = request.transformer or request.model
    common: dict[str, Any] = {"trust_remote_code": request.arguments["trust_remote_code"]}
    common |= {"revision": request.revision} if request.revision else {}
    weights = {**request.arguments, **common}
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, **common)
    found: dict[str, Any] = {}
    opened = [f"AutoTokenizer ({type(tokenizer).__name__})"]
    for head in request.heads:
        model = getattr(transformers, head).from_pretrained(encoder, **weights).eval()
        opened.append(f"{head} ({type(model).__name__})")
        found |= {f"{head}.{name}": value for name, value in _outputs(model, tokenizer, request.max_length).items()}
        task, text = TASKS.get(head), TEXTS[0]
        if task == "fill-mask":
            text = f"A {tokenizer.mask_token} text."
        if task:
            make: Any = transformers.pipeline  # its overloads ask for a literal task
            answer = make(task, model=model, tokenizer=tokenizer, device="cpu")(text)
            found[f"pipeline.{task}"] = torch.tensor(_numbers(answer), dtype=torch.float32)
            opened.append(f"pipeline({task!r})")
    if request.embeds:
        from sentence_transformers import SentenceTransformer

        embedder = SentenceTransformer(request.model, device="cpu", model_kwargs=request.arguments, **common)
        embedder.max_seq_length = min(embedder.max_seq_length or request.max_length, request.max_length)
        vectors = embedder.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
        found["SentenceTransformer.encode"] = vectors.float().contiguous()
        opened.append("SentenceTransformer")
    return found, opened


def _outputs(model: Any, tokenizer: Any, max_length: int) -> dict[str, Any]:
    import torch

    batch = dict(tokenizer(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))
    name = type(model).__name__
    if name.endswith("MultipleChoice"):
        batch = {key: value[:4].unflatten(0, (2, 2)) for key, value in batch.items()}
    elif name.endswith(("MaskedLM", "PreTraining")):  # two texts suffice: each token has as many scores as there are words
        batch = {key: value[:2] for key, value in batch.items()}
    if getattr(model.config, "type_vocab_size", 0) < 2:
        batch.pop("token_type_ids", None)
    with torch.inference_mode():
        given = model(**batch)
    # A pooler that was not trained is random.
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and name != "pooler_output"}
    return {name: value.float().contiguous().clone() for name, value in tensors.items()}


def _numbers(answer: Any) -> list[float]:
    """Return all floats in the nested answer of a pipeline, in order."""
    if isinstance(answer, dict | list | tuple):
        parts = answer.values() if isinstance(answer, dict) else answer
        return [number for part in parts for number in _numbers(part)]
    return [float(answer)] if isinstance(answer, float) or hasattr(answer, "item") else []


class NotOpened(Exception):
    """Signal that a fresh process could not open a model."""


def run(request: Request, *, cache: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Run :func:`compute` in a fresh process without minibert, network or Hub token.

    ``cache`` is the cache folder of the Hub that contains the model, if the model is not a
    folder. Raise :class:`NotOpened` if the fresh process cannot open the model.
    """
    import torch
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as place:
        environment = {name: value for name, value in os.environ.items() if name not in _TOKENS}
        environment |= {
            # With an empty folder, transformers copies the code from the model instead of using
            # an earlier copy.
            "HF_MODULES_CACHE": f"{place}/modules",
            "HF_TOKEN_PATH": f"{place}/token",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # rounding depends on the number
        }
        if cache:
            environment["HF_HUB_CACHE"] = str(cache)
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).resolve())],
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            env=environment,
            cwd=place,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise NotOpened(last[0])
        with safe_open(Path(place, _OUTPUTS), framework="pt") as file:
            outputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return outputs, json.loads(file.metadata()["opened"])


def _main() -> None:
    request = Request(**json.load(sys.stdin))
    sys.modules["minibert"] = None  # type: ignore[assignment]  # from here on, importing it fails
    try:
        outputs, opened = compute(request)
    except Exception as error:  # the calling process reports every error
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    from safetensors.torch import save_file

    save_file(outputs, _OUTPUTS, {"opened": json.dumps(opened)})


if __name__ == "__main__":
    _main()
