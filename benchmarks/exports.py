"""Open exported models where people use them: sentence-transformers 5 with and without ONNX, and optimum.

The exports are made here, and opened in the environment of ``peers.txt``, whose transformers is older than this package allows.
"""

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sentence_transformers import SentenceTransformer

from benchmarks.encode import peer_python
from benchmarks.machine import describe
from minibert.hub.convert import convert
from minibert.hub.export import export
from minibert.hub.onnx import export_onnx

_TEXTS = ["a short text", "another text, which is longer than the first one", "Überraschung 🙂"]
_WORKER = """
import json, sys
from importlib.metadata import version
import numpy as np
from optimum.onnxruntime import ORTModelForFeatureExtraction
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

plain, graph, texts, out = *sys.argv[1:3], json.loads(sys.argv[3]), sys.argv[4]
opened = {
    "sentence-transformers, plain export": SentenceTransformer(plain, device="cpu"),
    "sentence-transformers, ONNX": SentenceTransformer(graph, backend="onnx", model_kwargs={"file_name": "model.onnx"}),
}
found = {name: model.encode(texts) for name, model in opened.items()}
tokenizer, model = AutoTokenizer.from_pretrained(graph), ORTModelForFeatureExtraction.from_pretrained(graph)
batch = tokenizer(texts, padding=True, return_tensors="pt")
mask = batch["attention_mask"][:, :, None]
pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
found["optimum, ONNX, mean of the states"] = (pooled / pooled.norm(dim=1, keepdim=True)).numpy()
np.savez(out, **found)
packages = ("sentence-transformers", "transformers", "optimum", "onnxruntime")
print(json.dumps({name: version(name) for name in packages}))
"""


def run(model: Path, out: Path, work: Path) -> None:
    """Convert ``model``, export it as BERT and as ONNX, and compare the vectors that others compute with the source's."""
    work.mkdir(parents=True, exist_ok=True)
    python = peer_python(work)
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        convert(model, place / "converted")
        export(place / "converted", place / "plain")
        export_onnx(place / "converted", place / "onnx")
        arguments = [str(place / "plain"), str(place / "onnx"), json.dumps(_TEXTS), str(place / "vectors.npz")]
        done = subprocess.run([python, "-c", _WORKER, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        vectors = dict(np.load(place / "vectors.npz"))
    expected = SentenceTransformer(str(model), device="cpu").encode(_TEXTS)
    rows = {name: float(abs(found - expected).max()) for name, found in vectors.items()}
    versions = json.loads(done.stdout.splitlines()[-1])
    results = {
        "benchmark": "exports",
        "machine": describe(),
        "peers": versions,
        "model": model.name,
        "largest_difference": rows,
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, difference in rows.items():
        print(f"{name:40} {difference:.1e}")
