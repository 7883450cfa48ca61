"""Export a MiniBERT to ONNX, and compare the outputs of onnxruntime and torch."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minibert import MiniBertConfig, modeling_minibert
from minibert.files.disk import write_json
from minibert.files.installation import missing
from minibert.files.model_folder import encoder_folder, module_list
from minibert.hub import folders, parity
from minibert.hub.convert import Report, fitting_tokenizer, full
from minibert.hub.export import open_minibert
from minibert.inference.load import load, open_weights

GRAPH, QUANTIZED = "model.onnx", "model_int8.onnx"
# Bytes. An ONNX file has at most 2 GB, so larger weights go into a second file.
_LARGEST_FILE = 1_800_000_000


def export_onnx(
    model: str | Path, output_dir: str | Path, *, quantize: str | None = None, revision: str | None = None
) -> Report:
    """Export a MiniBERT to ONNX: write ``model.onnx``, the tokenizer and config.json.

    Batch size, length and number of choices are dynamic. The outputs of a sentence-transformers
    model are ``last_hidden_state`` and ``sentence_embedding``. The outputs of a model with a
    head are its logits.

    Args:
        model: folder of the model, or its id on the Hub.
        output_dir: new folder for the result.
        quantize: ``"int8"`` also writes ``model_int8.onnx``, whose matrices are 8-bit integers.
        revision: branch, tag or commit of a model on the Hub.

    Raises:
        FileNotFoundError: if the model, its weights or its tokenizer are missing.
        ValueError: if the model is not a MiniBERT, ``quantize`` is unknown, a package is
            missing, or the output folder is not empty.
        Mismatch: if onnxruntime and torch have different outputs. Nothing is written then.
    """
    output_dir = Path(output_dir)
    folders.check_output(output_dir)
    if quantize not in (None, "int8"):
        raise ValueError(f"--quantize={quantize} is unknown; use int8, or leave it out.")
    if lacking := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ValueError(missing(f"Export to ONNX needs {', '.join(lacking)}", "export"))
    folder, config, kind, checkpoint = open_minibert(model, revision)
    tokenizer = fitting_tokenizer(folder, config)
    has_pooler = "minibert.pooler.dense.weight" in {full(name, kind) for name in checkpoint}
    with parity.quiet():
        network = open_weights(
            getattr(modeling_minibert, f"MiniBert{kind}"), encoder_folder(folder), dtype=torch.float32
        ).eval()
        # The sentence-transformers modules that follow the transformer.
        heads = list(load(folder, device="cpu").float().eval())[1:] if module_list(folder) else []
    segments = config.type_vocab_size > 0 and "token_type_ids" in tokenizer.model_input_names
    inputs = ["input_ids", "attention_mask", *["token_type_ids"] * segments]
    wrapped = _Graph(network, inputs, heads, pooled=kind != "Model" or has_pooler)
    with folders.new_folder(output_dir) as temporary:
        parameters = _write(wrapped, temporary / GRAPH)
        _write_config(config, temporary / "config.json")
        folders.write_tokenizer(tokenizer, temporary)
        folders.copy_modules(folder, temporary)
        batches = _batches(wrapped, tokenizer, config.max_position_embeddings)
        with torch.inference_mode():
            expected = _named(wrapped, batches, lambda batch: [value.clone() for value in wrapped(*batch.values())])
        found = _by_runtime(wrapped, batches, temporary / GRAPH)
        differences = parity.compare(expected, found, f"The graph made of {model}")
        cosine = None
        if quantize:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            with parity.quiet():
                # One scale per row is far more accurate than one scale per matrix.
                quantize_dynamic(temporary / GRAPH, temporary / QUANTIZED, weight_type=QuantType.QInt8, per_channel=True)
            cosine = _cosines(expected, _by_runtime(wrapped, batches, temporary / QUANTIZED))
    return Report(
        source=str(model),
        output=str(output_dir),
        family="onnx",
        architecture=f"graph of MiniBert{kind}",
        tensors=len(checkpoint),
        parameters=parameters,
        differences=differences,
        cosine_int8=cosine,
    )


def _write_config(config: MiniBertConfig, file: Path) -> None:
    """Write a configuration without code, of a model type that optimum knows."""
    dropped = ("auto_map", *folders.OF_A_MACHINE)
    settings = {key: value for key, value in json.loads(config.to_json_string()).items() if key not in dropped}
    architectures = [name.replace("MiniBert", "Bert") for name in settings.get("architectures") or ["BertModel"]]
    write_json(file, {**settings, "model_type": "bert", "architectures": architectures, "exported_from": "minibert"})


class _Graph(nn.Module):
    """Wrap a model so that it takes inputs by position and returns outputs as a tuple.

    ``heads`` are the sentence-transformers modules that follow the transformer. If ``pooled`` is
    False, ``pooler_output`` is not an output.
    """

    def __init__(self, model: Any, inputs: list[str], heads: list[nn.Module], pooled: bool):
        super().__init__()
        self.model, self.inputs, self.heads = model, inputs, nn.ModuleList(heads)
        self.choices = type(model).__name__.endswith("MultipleChoice")
        ids = torch.ones((1, 2, 3) if self.choices else (1, 3), dtype=torch.long)
        names = [name for name, value in model(input_ids=ids, return_dict=True).items() if isinstance(value, Tensor)]
        if not pooled or heads:
            names = [name for name in names if name != "pooler_output"]
        self.outputs = [*names, *["sentence_embedding"] * bool(heads)]

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        batch = dict(zip(self.inputs, values, strict=True))
        found = dict(self.model(**batch, return_dict=True))
        if self.heads:
            features = {"token_embeddings": found["last_hidden_state"], "attention_mask": batch["attention_mask"]}
            for module in self.heads:
                features = module(features)
            found["sentence_embedding"] = features["sentence_embedding"]
        return tuple(found[name] for name in self.outputs)


def _write(graph: _Graph, file: Path) -> int:
    """Export ``graph`` to ``file``, and return the number of parameters."""
    shape, names = ((2, 2, 5), ("batch", "choices", "length")) if graph.choices else ((2, 5), ("batch", "length"))
    ids = torch.randint(1, graph.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    example["attention_mask"][1, ..., 3:] = 0
    with parity.quiet():
        program = torch.onnx.export(
            graph,
            tuple(example[name] for name in graph.inputs),
            dynamo=True,
            dynamic_shapes=(tuple(dict(enumerate(names)) for _ in graph.inputs),),
            input_names=graph.inputs,
            output_names=graph.outputs,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # contain stack traces, with paths of this machine
    count = sum(parameter.numel() for parameter in graph.parameters())
    program.save(file, external_data=count * 4 > _LARGEST_FILE)
    return count


def _batches(graph: _Graph, tokenizer: Any, positions: int) -> list[dict[str, Tensor]]:
    """Return the built-in texts, and random token ids in several shapes."""
    longest = min(tokenizer.model_max_length, positions)
    found = [{name: batch[name] for name in graph.inputs} for batch in parity.batches(tokenizer, longest)]
    generator = torch.Generator().manual_seed(0)
    for count, length in ((1, 1), (1, min(7, longest)), (2, longest), (6, min(3, longest))):
        ids = torch.randint(0, len(tokenizer), (count, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, (length + 1) // 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        found.append({name: batch[name] for name in graph.inputs})
    if graph.choices:
        found = [
            {name: value[: max(1, len(value) // 2 * 2)].unflatten(0, (-1, min(2, len(value)))) for name, value in batch.items()}
            for batch in found
        ]
    return found


def _named(graph: _Graph, batches: list[dict[str, Tensor]], compute: Any) -> dict[str, Tensor]:
    """Return the outputs for all batches by name, without padding tokens."""
    found = {}
    for number, batch in enumerate(batches):
        mask = batch["attention_mask"].bool()
        for name, value in zip(graph.outputs, compute(batch), strict=True):
            per_token = not graph.choices and value.shape[:2] == mask.shape and name != "sentence_embedding"
            found[f"{name} {number}"] = value[mask] if per_token else value
    return found


def _by_runtime(graph: _Graph, batches: list[dict[str, Tensor]], file: Path) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def compute(batch: dict[str, Tensor]) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in batch.items()}
        return [torch.from_numpy(value) for value in session.run(graph.outputs, feed)]

    return _named(graph, batches, compute)


def _cosines(exact: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Return the lowest and the mean cosine of exact and quantized vectors."""
    names = [key.split()[0] for key in exact]
    name = "sentence_embedding" if "sentence_embedding" in names else names[0]
    pairs = [(exact[f"{name} {number}"], found[f"{name} {number}"]) for number in range(3)]
    cosines = torch.cat([nn.functional.cosine_similarity(one, other, dim=-1).flatten() for one, other in pairs])
    return {"lowest": float(cosines.min()), "mean": float(cosines.mean())}
