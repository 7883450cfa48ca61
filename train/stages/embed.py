"""The ``embed`` stage: sentence embeddings from pairs, trained by sentence-transformers' own trainer.

What is added here is what a recipe promises: checkpoints that are checked before they are used, the best weights kept apart,
``log.jsonl``, a clean stop on Ctrl-C, and a result that appears only when it is whole.
"""

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoModel, ProgressCallback, TrainerCallback

from minibert.data.load import check_columns, join, load, text_columns
from minibert.data.source import DataSource
from minibert.data.text_pairs import make_pairs
from minibert.data.tokenized_corpus import load_documents
from minibert.files.model_folder import opening
from minibert.train import checkpoint
from minibert.train.arguments import EmbedStage
from minibert.train.loop import Log, StopRequest, check_precision, in_precision, keep_memory, warn_of_precision
from minibert.train.stage import StageContext, load_model, load_tokenizer, sequence_length

logger = logging.getLogger(__name__)

# A passage whose similarity to the query is within this share of the right one's may well answer the query too.
_MARGIN = 0.05
# What transformers calls the schedules that have another name there.
_SCHEDULERS = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def embed(args: EmbedStage, context: StageContext) -> dict[str, Any]:
    """Train embeddings as ``args`` say and leave a sentence-transformers folder in ``context.output_dir``.

    The loss is the multiple negatives ranking loss (Henderson et al. 2017, arXiv:1705.00652), or its cached form (Gao et al.
    2021, arXiv:2101.06983).

    Returns:
        Retrieval figures on ``eval_data`` (if any), the number of rows and steps, the mean loss and the training seconds.

    Raises:
        ValueError: for data without the columns needed, fewer than two rows, or a length above the model's positions.
        FloatingPointError: when the loss is not a finite number.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint was saved.
    """
    check_precision(args)
    warn_of_precision(args)
    keep_memory()
    sources = training_pairs(args, context.seed)
    evaluator = _evaluator(args)
    model = _starting_model(args, context)
    sources = _with_negatives(sources, model, args, context.output_dir / "negatives")
    callback = _Callback(args, context, model)
    trainer = _Trainer(
        model=model,
        args=_trainer_arguments(args, context),
        train_dataset=sources if args.one_source_per_batch else join(list(sources.values())),
        loss=_loss(args, model),
        evaluator=evaluator,
        callbacks=[callback],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress())
    callback.accelerator = trainer.accelerator
    with callback.stop.listening():
        result = trainer.train(resume_from_checkpoint=_newest_checkpoint(context.output_dir / "checkpoints"))
    if callback.interrupted:
        where = f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, after saving a checkpoint."
        raise KeyboardInterrupt(where) if callback.interrupted == signal.SIGINT else SystemExit(128 + callback.interrupted)
    metrics = {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        **callback.load_best(),
        "train_loss": result.training_loss,
        "train_rows": sum(map(len, sources.values())),
        "train_seconds": callback.seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if PartialState().is_main_process:
        _save_result(model, context.output_dir)
    return metrics


def training_pairs(args: EmbedStage, seed: int) -> dict[str, Dataset]:
    """The training data with just its columns of queries, passages and (if named) negatives, in that order.

    Args:
        seed: of pairs that are made.

    Returns:
        With ``one_source_per_batch`` one data set for each source, else one of pairs and one of those made of plain texts, by
        place and path.
    """
    if args.one_source_per_batch:
        groups = [[source] for source in args.data]
    else:
        groups = [[one for one in args.data if args.makes_pairs_of(one) == made] for made in (False, True)]
    found: dict[str, Dataset] = {}
    for number, group in enumerate(filter(None, groups)):
        if args.makes_pairs_of(group[0]):
            documents = [load_documents(source, "train", args.text_column, args.sample_by) for source in group]
            dataset = make_pairs(join(documents), seed)
            columns = dataset.column_names
        else:
            dataset = load(group)
            columns = _pair_columns(args, dataset, group)
        if args.negative_column:
            check_columns(dataset, [args.negative_column], group)
            columns.append(args.negative_column)
        if len(dataset) < 2:
            raise ValueError(
                f"Training pairs are each other's negatives, so at least two rows are needed; {group[0].path} has one."
            )
        names = dict(zip(columns, ("anchor", "positive", "negative"), strict=False))
        found[f"{number} {Path(group[0].path).name}"] = dataset.select_columns(columns).rename_columns(names)
    return found


def _with_negatives(
    sources: dict[str, Dataset], model: SentenceTransformer, args: EmbedStage, folder: Path
) -> dict[str, Dataset]:
    """Pairs with the passages that ``model`` holds for most alike the query without being almost as alike as the right one,
    where ``args`` ask for them.

    Mined once and kept in ``folder``, so that a run that resumes trains on the same, as does a source that is given again.
    Pairs with too few of them are left out.
    """
    state = PartialState()
    mined = dict(sources)
    for number, (name, pairs) in enumerate(sources.items()):
        # Sources that share a data set mine the same number.
        source = args.data[number if args.one_source_per_batch else 0]
        wanted = args.hard_negatives_of(source)
        if not wanted:
            continue
        kept = folder / str(args.data.index(source) if args.one_source_per_batch else number)
        if state.is_main_process and not kept.exists():
            with in_precision(args):
                found = mine_hard_negatives(
                    pairs,
                    model,
                    num_negatives=wanted,
                    relative_margin=_MARGIN,
                    range_max=50 + wanted,
                    output_format="n-tuple",
                    batch_size=args.eval_batch_size,
                    verbose=False,
                )
            if len(found) < 2:
                raise ValueError(
                    f"Only {len(found)} of {len(pairs)} pairs of {name.partition(' ')[2]} have {wanted} hard "
                    "negatives; lower hard_negatives, or start from a model that tells these texts apart."
                )
            checkpoint.write_folder(kept, partial(Dataset.save_to_disk, found))
        state.wait_for_everyone()
        mined[name] = Dataset.load_from_disk(kept)
    return mined


def _pair_columns(args: EmbedStage, dataset: Dataset, sources: Sequence[DataSource]) -> list[str]:
    named = [args.anchor_column, args.positive_column]
    free = iter(name for name in text_columns(dataset) if name not in {*named, args.negative_column})
    columns = [name for wanted in named if (name := wanted or next(free, None))]
    if len(columns) < 2:
        raise ValueError(
            f"{' + '.join(source.path for source in sources)} needs two columns of strings, queries and passages; "
            f"it has {', '.join(dataset.column_names)}. Name them with anchor_column: and positive_column:."
        )
    check_columns(dataset, columns, sources)
    return columns


def _starting_model(args: EmbedStage, context: StageContext) -> SentenceTransformer:
    """The encoder of the stage's model under pooling (and normalisation), as sentence-transformers modules."""
    tokenizer = load_tokenizer(context)
    encoder = load_model(AutoModel, args, context, tokenizer)
    tokenizer.model_max_length = sequence_length(args.max_length, encoder.config, tokenizer)
    pooling = args.pooling or getattr(encoder.config, "pooling", "mean")
    if hasattr(encoder.config, "pooling"):
        encoder.config.pooling = pooling
    model = sentence_model(encoder, tokenizer, context.output_dir / ".start", pooling, args.normalize)
    if args.gradient_checkpointing:
        transformer: Any = model[0].auto_model
        transformer.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def sentence_model(
    encoder: Any, tokenizer: Any, start: Path, pooling: Any, normalize: bool, **options: Any
) -> SentenceTransformer:
    """``encoder`` under pooling (and normalisation), as sentence-transformers modules.

    Args:
        start: a folder that does not exist: sentence-transformers opens folders, so both are saved there for a moment.
        options: of :class:`SentenceTransformer`.
    """
    state = PartialState()
    if state.is_main_process:
        encoder.save_pretrained(start)
        tokenizer.save_pretrained(start)
    state.wait_for_everyone()
    trusting = {"trust_remote_code": False}
    with opening(start):
        transformer = Transformer(str(start), model_kwargs=trusting, processor_kwargs=trusting, config_kwargs=trusting)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(start)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)]
    return SentenceTransformer(modules=modules + [Normalize()] * normalize, **{"similarity_fn_name": "cosine"} | options)


def _loss(args: EmbedStage, model: SentenceTransformer) -> Any:
    options: dict[str, Any] = {"scale": args.scale, "gather_across_devices": args.gather_across_devices}
    if args.loss == "cached_mnrl":
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch_size, **options)
    return MultipleNegativesRankingLoss(model, **options)


def _trainer_arguments(args: EmbedStage, context: StageContext) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(context.output_dir / "checkpoints"),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_betas[0],
        adam_beta2=args.adam_betas[1],
        adam_epsilon=args.adam_epsilon,
        warmup_steps=args.warmup_steps or args.warmup_ratio,  # a fraction is a share of all steps
        lr_scheduler_type=_SCHEDULERS.get(args.schedule, args.schedule),
        lr_scheduler_kwargs={"num_decay_steps": args.decay_ratio, "decay_type": "1-sqrt"} if args.schedule == "wsd" else {},
        max_grad_norm=args.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),  # said outright, because bf16 is refused without a GPU otherwise
        bf16=args.precision == "bf16",
        fp16=args.precision == "fp16",
        torch_compile=args.compile,
        batch_sampler=args.batch_sampler,
        multi_dataset_batch_sampler="proportional",
        logging_steps=args.log_steps,
        logging_nan_inf_filter=False,  # the default hides a loss that is not a number
        save_strategy="steps" if args.save_steps else "epoch",
        save_steps=args.save_steps or 500,
        save_total_limit=args.save_total_limit,
        seed=context.seed,
        data_seed=context.seed,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=args.trackers or "none",
        disable_tqdm=False,
    )


class _Trainer(SentenceTransformerTrainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' own, whose warm-up-stable-decay schedule is told here how many steps its decay takes."""
        options = self.args.lr_scheduler_kwargs
        if isinstance(options, dict) and "num_decay_steps" in options:  # until here, a share of all steps
            decay = max(1, round(options["num_decay_steps"] * num_training_steps))
            self.args.lr_scheduler_kwargs = {**options, "num_decay_steps": decay}
        return super().create_scheduler(num_training_steps, optimizer)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: a card is written when a model is published, from facts measured in the run."""


class _Retrieval(BaseEvaluator):
    """Retrieval on held-out pairs: the figures of ``minibert evaluate``."""

    def __init__(self, pairs: Dataset, columns: list[str], batch_size: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.queries, self.answers = (list(pairs[name]) for name in columns)
        self.batch_size = batch_size

    def __call__(self, model: Any, *_: Any, **__: Any) -> dict[str, float]:
        from minibert.evaluation.evaluate import retrieval

        found = retrieval(model, self.queries, self.answers, baselines=False, batch_size=self.batch_size)
        figures: dict[str, float] = found["systems"]["model"]
        return figures


def _evaluator(args: EmbedStage) -> _Retrieval | None:
    if args.eval_data is None:
        return None
    pairs = load(args.eval_data, split="validation")
    return _Retrieval(pairs, _pair_columns(args, pairs, args.eval_data), args.eval_batch_size)


class _Progress(ProgressCallback):
    """The usual progress bar, which leaves standard output to the figures that are asked for."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)


class _Callback(TrainerCallback):
    """Log lines, the best weights so far, sealed checkpoints, and the stop after the step in which Ctrl-C came."""

    def __init__(self, args: EmbedStage, context: StageContext, model: SentenceTransformer):
        self.metric, self.output_dir, self.model = args.metric_for_best, context.output_dir, model
        self.measured, self.eval_steps = args.eval_data is not None, args.eval_steps
        self.best_folder = context.output_dir / "checkpoints" / "best"
        self.state = PartialState()
        self.stop, self.interrupted = StopRequest(), 0
        self.evaluation: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.accelerator: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = self.output_dir / "log.jsonl"
        self.log = Log(self.accelerator, path, state.global_step)
        # Seconds count over all the runs that led here.
        lines = path.read_text(encoding="utf-8").splitlines() if self.state.is_main_process else []
        self.start = time.perf_counter() - max((json.loads(line).get("seconds", 0.0) for line in lines), default=0.0)
        # Figures of a step that is still to come belong to a checkpoint that was lost, and will come again.
        if state.global_step and self.best_folder.exists() and checkpoint.damage(self.best_folder) is None:
            best = json.loads((self.best_folder / "best.json").read_text(encoding="utf-8"))
            self.best = best if best["step"] <= state.global_step else None
        measured = [figures for line in state.log_history if (figures := _retrieval_figures(line))]
        self.evaluation = measured[-1] if measured else {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        rate, grad_norm = logs["learning_rate"], float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(logs["loss"]) and (math.isfinite(grad_norm) or args.fp16)):  # fp16 skips such a step by itself
            raise FloatingPointError(
                f"The loss is {logs['loss']} and the norm of its gradient {grad_norm} near step {state.global_step} of "
                f"{state.max_steps}, learning rate {rate:.3g}. Lower learning_rate or use precision: fp32; checkpoints of "
                "earlier steps are untouched."
            )
        line = {"step": state.global_step, "epoch": round(state.epoch, 4), "loss": logs["loss"], "learning_rate": rate}
        self.log.write({**line, "grad_norm": grad_norm, "seconds": self._elapsed()})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.evaluation = _retrieval_figures(metrics or {})
        self.log.write({"step": state.global_step, "epoch": round(state.epoch, 4), **self.evaluation})
        name = f"eval_{self.metric}"
        if self.metric is None or (self.best and self.evaluation[name] <= self.best["figures"][name]):
            return
        self.best = {"step": state.global_step, "figures": self.evaluation}
        if self.state.is_main_process:

            def fill(folder: Path) -> None:
                save_weights(self.model, str(folder / "model.safetensors"))
                (folder / "best.json").write_text(json.dumps(self.best), encoding="utf-8")

            checkpoint.write_folder(self.best_folder, fill)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state.wait_for_everyone()  # every process has written its part
        if self.state.is_main_process:
            checkpoint.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        # Measured here and not at the end of the epoch, which comes after the step's checkpoint: a run that resumes from
        # that checkpoint would not know the figures.
        due = state.global_step % self.eval_steps == 0 if self.eval_steps else float(state.epoch).is_integer()
        control.should_evaluate = self.measured and (due or last)
        number = self.stop.number
        if self.state.num_processes > 1:  # they must stop at the same step, and asking at every step would cost time
            if state.global_step % args.logging_steps:
                return
            number = int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
        if number and not last:
            self.interrupted = number
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self._elapsed()

    def _elapsed(self) -> float:
        return round(time.perf_counter() - self.start, 3)

    def load_best(self) -> dict[str, float]:
        """Put the best weights, if any were kept, into the model, and return the figures of the weights it now has."""
        if self.best is None:
            return self.evaluation
        self.state.wait_for_everyone()
        load_weights(self.model, self.best_folder / "model.safetensors")
        return {**self.best["figures"], "best_step": self.best["step"]}


def _retrieval_figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(("eval_recall", "eval_mrr", "eval_ndcg"))}


def _newest_checkpoint(root: Path) -> str | None:
    """The newest checkpoint that is whole; damaged ones that are newer are named in a warning and deleted."""
    state = PartialState()
    found = sorted(root.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    good = next((folder for folder in found if checkpoint.damage(folder) is None), None)
    state.wait_for_everyone()  # everybody has looked before anything goes
    if state.is_main_process:
        for folder in found[: found.index(good) if good else None]:
            logger.warning("%s It is not used.", checkpoint.damage(folder))
            shutil.rmtree(folder)
        if good:
            logger.warning("Resuming from %s.", good)
    state.wait_for_everyone()
    return str(good) if good else None


def _save_result(model: SentenceTransformer, output_dir: Path) -> None:
    whole = output_dir / "checkpoints" / "final"
    checkpoint.write_folder(whole, lambda folder: model.save_pretrained(str(folder), create_model_card=False))
    checkpoint.move_files(whole, output_dir)
