"""Open a model in a fresh process that cannot import this package, and return its outputs.

Run as a script, this file reads a request (JSON) on standard input, blocks ``minibert``, opens the model in every way that its
card promises, writes the outputs into a safetensors file, and prints a report (JSON). Imported, it starts such a process.
So it imports nothing of this package, and only the standard library before the request is read.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Short enough for every tiny model: plain, empty, longer than the others, other scripts, punctuation.
TEXTS = [
    "A short text.",
    "",
    "How do I read a table, and invert the matrix that it holds?",
    "Größe, naïve, 北京市, Ελλάδα 🙂",
    'TABS\tand\nlines -- 1,234.56 (ok?) "quoted"',
]
# The pipeline of transformers for a head; question answering, multiple choice and pretraining have none.
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


@dataclass
class Request:
    """A model to open, and how.

    Attributes:
        model: folder, or id on the Hub that the cache holds.
        heads: names of ``Auto*`` classes.
        embeds: sentence-transformers opens it too.
        trust: run the code that comes with it.
        max_length: of the texts, in tokens.
        revision: commit of a model in the cache.
        transformer: folder of the transformer, if that is not ``model`` itself.
        dtype: of the weights; the default is that of its configuration.
    """

    model: str
    heads: list[str]
    embeds: bool
    trust: bool
    max_length: int
    revision: str | None = None
    transformer: str | None = None
    dtype: str | None = None


def compute(request: Request) -> tuple[dict[str, Any], list[str]]:
    """Return every output of the model as a float32 tensor by name, and the ways in which the model was opened."""
    import torch
    import transformers

    encoder = request.transformer or request.model
    common: dict[str, Any] = {"trust_remote_code": request.trust}
    common |= {"revision": request.revision} if request.revision else {}
    precise = {"dtype": request.dtype} if request.dtype else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, **common)
    found: dict[str, Any] = {}
    opened = [f"AutoTokenizer ({type(tokenizer).__name__})"]
    for head in request.heads:
        model = getattr(transformers, head).from_pretrained(encoder, **common, **precise).eval()
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

        embedder = SentenceTransformer(request.model, device="cpu", model_kwargs=precise, **common)
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
    """Return every fraction in a nested answer, in order."""
    if isinstance(answer, dict | list | tuple):
        parts = answer.values() if isinstance(answer, dict) else answer
        return [number for part in parts for number in _numbers(part)]
    return [float(answer)] if isinstance(answer, float) or hasattr(answer, "item") else []


# -------------------------------------------------------------------------------------- starting such a process


class NotOpened(Exception):
    """The model could not be opened in the fresh process; the text says why."""


def run(request: Request, *, cache: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Call :func:`compute` in a fresh process without this package, without the network and without the token.

    Args:
        request: the model, and how to open it.
        cache: of the Hub, for a model that is not a folder.

    Raises:
        NotOpened: it failed there.
    """
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as place:
        # The empty folder for modules makes transformers copy the code from the model, not use an earlier copy.
        settings = {"HF_MODULES_CACHE": f"{place}/modules", "HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": f"{place}/token"}
        settings |= {"HF_HUB_CACHE": str(cache)} if cache else {}
        settings |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        settings["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # another number of threads may round differently
        hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).resolve())],
            input=json.dumps({**asdict(request), "out": f"{place}/outputs.safetensors"}),
            capture_output=True,
            text=True,
            env={name: value for name, value in os.environ.items() if name not in hidden} | settings,
            cwd=place,
        )
        try:
            report = json.loads(done.stdout)
        except ValueError:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise NotOpened(f"the process ended early: {last}") from None
        if "error" in report:
            raise NotOpened(report["error"])
        return load_file(f"{place}/outputs.safetensors"), report["opened"]


def _main() -> None:
    request = json.load(sys.stdin)
    out = request.pop("out")
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # standard output carries the report alone, whatever libraries print
    sys.modules["minibert"] = None  # type: ignore[assignment]  # from here on, importing it fails
    try:
        found, opened = compute(Request(**request))
        from safetensors.torch import save_file

        save_file(found, out)
        report: dict[str, Any] = {"opened": opened}
    except Exception as error:  # whatever it is, the report tells the other process
        report = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    with real:
        json.dump(report, real)


if __name__ == "__main__":
    _main()
