"""What a model computes for those who do not have this package: opened in a fresh process that cannot import it.

Run as a script, this file reads a request (JSON) on standard input, blocks ``minibert``, opens the model in every way that its
card promises, writes the outputs into a safetensors file, and prints a report (JSON). Imported, it starts such a process.
So it imports nothing of this package, and nothing but the standard library before the request is read.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Short enough for every tiny model, and of every kind: empty, other scripts, punctuation, a longer one that is padded to.
TEXTS = (
    "A short text.",
    "",
    "How do I read a table, and invert the matrix that it holds?",
    "Größe, naïve, 北京市, Ελλάδα 🙂",
    'TABS\tand\nlines -- 1,234.56 (ok?) "quoted"',
)
# The pipeline of transformers for a head; question answering, multiple choice and pretraining have none.
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


@dataclass
class Request:
    """What to open and how.

    Attributes:
        model: folder, or id on the Hub that the cache holds.
        revision: commit of a model in the cache.
        transformer: folder of the transformer, where that is not ``model`` itself.
        heads: names of ``Auto*`` classes.
        embeds: whether sentence-transformers opens it too.
        trust: run the code that comes with it.
        max_length: tokens of the longest text that is given to it.
        dtype: of the weights; the default is what its configuration says.
    """

    model: str
    heads: list[str]
    embeds: bool
    trust: bool
    max_length: int
    revision: str | None = None
    transformer: str | None = None
    dtype: str | None = None
    threads: int = 1
    texts: list[str] = field(default_factory=lambda: list(TEXTS))


def compute(request: Request) -> tuple[dict[str, Any], list[str]]:
    """Every output of the model as tensors by name, and the ways in which it was opened."""
    import torch
    import transformers

    torch.set_num_threads(request.threads)
    encoder = request.transformer or request.model
    common: dict[str, Any] = {"trust_remote_code": request.trust}
    if request.revision:
        common["revision"] = request.revision
    precise = {"dtype": request.dtype} if request.dtype else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, **common)
    found: dict[str, Any] = {}
    opened = [f"AutoTokenizer ({type(tokenizer).__name__})"]
    for head in request.heads:
        model = getattr(transformers, head).from_pretrained(encoder, **common, **precise).eval()
        opened.append(f"{head} ({type(model).__name__})")
        for name, value in _outputs(model, _batch(tokenizer, request, type(model).__name__)).items():
            found[f"{head}.{name}"] = value
        if task := TASKS.get(head):
            make: Any = transformers.pipeline  # whose overloads want the task written out
            pipeline = make(task, model=model, tokenizer=tokenizer, device="cpu")
            found[f"pipeline.{task}"] = _numbers(_ask(pipeline, task, tokenizer, request.max_length))
            opened.append(f"pipeline({task!r})")
        del model
    if request.embeds:
        found["SentenceTransformer.encode"] = _embed(request, common, precise)
        opened.append("SentenceTransformer")
    return found, opened


def _batch(tokenizer: Any, request: Request, name: str) -> dict[str, Any]:
    batch = dict(tokenizer(request.texts, padding=True, truncation=True, max_length=request.max_length, return_tensors="pt"))
    if name.endswith("MultipleChoice"):
        batch = {key: value[:4].unflatten(0, (2, 2)) for key, value in batch.items()}
    elif name.endswith(("MaskedLM", "PreTraining")):  # a number for every word of the vocabulary: two texts are many
        batch = {key: value[:2] for key, value in batch.items()}
    return batch


def _outputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """All tensors that the model gives, in float32; of what it gives per token that of real tokens."""
    import torch

    if getattr(model.config, "type_vocab_size", 0) < 2:
        batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
    with torch.inference_mode():
        given = model(**batch)
    mask = batch["attention_mask"].bool()
    found = {}
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or name == "pooler_output":  # which is random where none was trained
            continue
        per_token = value.shape[:2] == mask.shape and not name.startswith("seq") and not type(model).__name__.endswith("Choice")
        found[name] = (value[mask] if per_token else value).float().contiguous().clone()
    return found


def _ask(pipeline: Any, task: str, tokenizer: Any, max_length: int) -> Any:
    cut = {"truncation": True, "max_length": max_length}
    if task == "fill-mask":
        return pipeline(f"A {tokenizer.mask_token} text.", top_k=5) if tokenizer.mask_token else []
    if task == "text-classification":
        return [pipeline(text, top_k=None, **cut) for text in TEXTS]
    if task == "feature-extraction":
        return [pipeline(text, tokenize_kwargs=cut) for text in TEXTS[:2]]
    return pipeline(TEXTS[0])


def _numbers(value: Any) -> Any:
    """Every fraction in a nested answer, in order."""
    import torch

    def walk(part: Any) -> Any:
        if isinstance(part, dict):
            for inner in part.values():
                yield from walk(inner)
        elif isinstance(part, list | tuple):
            for inner in part:
                yield from walk(inner)
        elif hasattr(part, "item"):
            yield float(part.item())
        elif isinstance(part, float):
            yield part

    return torch.tensor(list(walk(value)), dtype=torch.float32)


def _embed(request: Request, common: dict[str, Any], precise: dict[str, Any]) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(request.model, device="cpu", model_kwargs=precise, **common)
    model.max_seq_length = min(model.max_seq_length or request.max_length, request.max_length)
    vectors = model.encode(request.texts, convert_to_tensor=True, show_progress_bar=False)
    return vectors.float().cpu().contiguous()


# ---------------------------------------------------------------------------------------------- starting such a process


class NotOpened(Exception):
    """The model could not be opened in the fresh process; the text says why."""


def run(request: Request, *, cache: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """:func:`compute` in a fresh process without this package, without the network and without the token.

    Args:
        cache: the Hub's cache to read from, for a model that is no folder.

    Raises:
        NotOpened: it failed there.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as place:
        hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        # The code is taken from the model, not from an earlier copy of it, and writes nothing where others would find it.
        environment |= {"HF_MODULES_CACHE": f"{place}/modules", "HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": f"{place}/token"}
        environment |= {"HF_HUB_CACHE": str(cache)} if cache else {}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).resolve())],
            input=json.dumps({**asdict(request), "out": f"{place}/outputs.safetensors"}),
            capture_output=True,
            text=True,
            env=environment,
            cwd=place,
        )
        try:
            report = json.loads(done.stdout)
        except ValueError:
            ending = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise NotOpened(f"the process ended before it was done: {ending}") from None
        if "error" in report:
            raise NotOpened(report["error"])
        return load_file(f"{place}/outputs.safetensors"), report["opened"]


def _main() -> None:
    request = json.load(sys.stdin)
    out = request.pop("out")
    # Only the report goes to the real standard output, whatever libraries print.
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.modules["minibert"] = None  # type: ignore[assignment]  # from here on, importing it fails
    try:
        found, opened = compute(Request(**request))
        from safetensors.torch import save_file

        save_file(found, out)
        report: dict[str, Any] = {"opened": opened}
    except Exception as error:  # the report is how the other process hears of it, whatever it is
        import traceback

        traceback.print_exc()
        report = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    json.dump(report, real)
    real.flush()


if __name__ == "__main__":
    _main()
