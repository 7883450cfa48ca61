"""Another backend of sentence-transformers, in the environment it needs: run by ``benchmarks/encode.py``, not by hand.

``python peer.py MODEL WORK`` reads one JSON object per line, answers each with one, and imports nothing of this package:
``{"open": BACKEND}``, ``{"encode": BACKEND, "texts": FILE, "vectors": FILE, "batch_size": 32}``, ``{"versions": true}``.
"""

import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "onnxruntime",
    "optimum",
    "optimum-onnx",
    "openvino",
    "optimum-intel",
)


def open_model(backend: str, model: str, work: Path) -> SentenceTransformer:
    """The model on the backend ``torch``, ``onnx``, ``onnx-int8`` or ``openvino``; graphs are exported into ``work``."""
    if backend == "torch":
        return SentenceTransformer(model, device="cpu")
    kind = backend.partition("-")[0]
    folder = work / kind
    if not folder.exists():
        opened = SentenceTransformer(model, device="cpu", backend=kind, model_kwargs={"export": True})
        opened.save_pretrained(str(folder))
    if backend != "onnx-int8":
        return SentenceTransformer(str(folder), device="cpu", backend=kind)
    from sentence_transformers import export_dynamic_quantized_onnx_model

    if not (folder / "onnx" / "model_qint8_avx512_vnni.onnx").exists():
        opened = SentenceTransformer(str(folder), device="cpu", backend="onnx")
        export_dynamic_quantized_onnx_model(opened, "avx512_vnni", str(folder))
    file = {"file_name": "onnx/model_qint8_avx512_vnni.onnx"}
    return SentenceTransformer(str(folder), device="cpu", backend="onnx", model_kwargs=file)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    model, work = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    opened: dict[str, SentenceTransformer] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, object] = {}
        if "versions" in asked:
            answer = {"versions": versions()}
        elif "open" in asked:
            started = time.perf_counter()
            opened[asked["open"]] = open_model(asked["open"], model, work)
            answer = {"seconds": time.perf_counter() - started}
        else:
            texts = json.loads(Path(asked["texts"]).read_text(encoding="utf-8"))
            started = time.perf_counter()
            vectors = opened[asked["encode"]].encode(texts, batch_size=asked["batch_size"], show_progress_bar=False)
            answer = {"seconds": time.perf_counter() - started}
            np.save(asked["vectors"], vectors.astype(np.float32))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
