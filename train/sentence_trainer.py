"""Train a sentence-transformers model as a stage of a recipe.

As in other stages, training saves a checkpoint on Ctrl-C and SIGTERM, resumes only from valid
checkpoints, keeps the best weights and writes ``log.jsonl``.
"""

import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, reduce
from safetensors.torch import load_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, TrainerState

from minibert.evaluation.evaluate import SIMILARITY_COLUMNS
from minibert.files.disk import read_json
from minibert.files.processes import check_workers, processes
from minibert.train import checkpoint
from minibert.train.arguments import EmbedStage
from minibert.train.loop import Log, StopRequest, keep_memory, schedule_of, seed_everything
from minibert.train.stage import StageContext

logger = logging.getLogger(__name__)


def train(
    model: SentenceTransformer,
    pairs: Any,
    loss: Any,
    args: EmbedStage,
    context: StageContext,
    evaluate: Callable[[Any], dict[str, Any]] | None,
) -> dict[str, Any]:
    """Train ``model`` on ``pairs``, and save the model in ``context.output_dir``.

    If the folder has a valid checkpoint, resume from the newest valid checkpoint. ``evaluate``
    returns metrics of the model. Larger metrics must be better.

    Raises:
        FloatingPointError: if the loss or its gradient is not finite.
        KeyboardInterrupt, SystemExit: on Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    check_workers(args.num_workers)
    keep_memory()
    parts = list(pairs.values()) if isinstance(pairs, dict) else [pairs]
    read = check_batches(parts, args, context.seed)
    arguments = trainer_arguments(args, context)
    columns = {name for part in parts for name in part.column_names} - {*SIMILARITY_COLUMNS}
    if any(model.prompts.values()):
        arguments.prompts = {name: model.prompts["query" if name == "anchor" else "document"] or "" for name in columns}
    trainer = _Trainer(model=model, args=arguments, train_dataset=pairs, loss=loss)
    trainer.remove_callback(ProgressCallback)
    callback = trainer.stage = _StageCallback(trainer, args, context.output_dir, evaluate)
    trainer.add_callback(callback)
    found, best = checkpoint.newest(callback.root, args.save_total_limit)
    state = trainer.state
    if found:
        state = TrainerState.load_from_json(f"{found}/trainer_state.json")
        callback.saved = read_json(found / "state.json")
        callback.best = read_json(best / "state.json") if best else None
    if found and (state.global_step >= state.max_steps or callback.stopped_early(state)):  # killed while it saved the result
        trainer._load_from_checkpoint(found)
        callback.restore(state)
    else:
        try:
            with callback.stop.listening():
                trainer.train(resume_from_checkpoint=str(found) if found else None)
        finally:
            if callback.training_bar is not None:  # an error would be printed next to an open bar
                callback.training_bar.close()
        state = trainer.state
    if callback.interrupted:
        message = f"Stopped at step {state.global_step} of {state.max_steps}, after saving a checkpoint."
        raise KeyboardInterrupt(message) if callback.interrupted == signal.SIGINT else SystemExit(128 + callback.interrupted)
    metrics = {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 4),
        "stopped_early_at": state.global_step if callback.stopped_early(state) else None,
        **callback.load_best(),
        **read,
        "train_loss": trainer._total_loss_scalar / max(1, state.global_step),
        "train_seconds": callback.seconds(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if processes().is_main_process:
        fast = model.tokenizer.backend_tokenizer  # a run that resumes after the last step has not used it
        fast.no_truncation()
        fast.no_padding()
        final = context.output_dir / "checkpoints" / "final"
        checkpoint.write_folder(final, lambda folder: model.save_pretrained(str(folder), create_model_card=False))
        checkpoint.move_files(final, context.output_dir)
    return metrics


def trainer_arguments(args: EmbedStage, context: StageContext) -> SentenceTransformerTrainingArguments:
    """Convert the arguments of a stage to those of the trainer."""
    return SentenceTransformerTrainingArguments(
        output_dir=str(context.output_dir / "checkpoints"),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_betas[0],
        adam_beta2=args.adam_betas[1],
        adam_epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),  # otherwise the trainer refuses bf16 without a GPU
        bf16=args.precision == "bf16",
        fp16=args.precision == "fp16",
        torch_compile=args.compile,
        logging_steps=args.log_steps,
        logging_nan_inf_filter=False,  # the default hides losses that are not finite
        save_strategy="steps" if args.save_steps else "epoch",
        save_steps=args.save_steps or 500,
        seed=context.seed,
        data_seed=context.seed,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=args.trackers or "none",
        disable_tqdm=False,
        batch_sampler=args.batch_sampler,
        multi_dataset_batch_sampler="proportional",
    )


def check_batches(parts: list[Any], args: EmbedStage, seed: int) -> dict[str, float]:
    """Return how many rows the batches of an epoch read, and their mean size.

    A batch never has two equal texts, so rows of the same query or passage may find no
    batch.

    Raises:
        ValueError: if less than half of the rows are read, or every batch has one row, which
            has no negatives.
    """
    rows = batches = total = 0
    options: Any = {"drop_last": False, "generator": torch.Generator(), "seed": seed, "valid_label_columns": ["score"]}
    for part in parts:
        sampler = NoDuplicatesBatchSampler(part, args.batch_size, **options)
        every = args.batch_sampler != "no_duplicates"
        # The trainer takes as many batches as all rows would fill.
        rows += len(part) if every else sum(len(batch) for batch in islice(sampler, len(sampler)))
        batches, total = batches + len(sampler), total + len(part)
    found = {"rows_per_epoch": rows, "rows_left_out": total - rows, "mean_batch_size": round(rows / batches, 2)}
    if processes().is_main_process:
        logger.info(
            "An epoch reads %d of %d rows in batches of %.1f rows on average; %d rows are left out.",
            *(rows, total, rows / batches, total - rows),
        )
    mined = any(len(part.column_names) > 2 for part in parts)
    if 2 * rows < total or (rows == batches and not mined):
        raise ValueError(
            f"An epoch would read only {rows} of {total} rows, in batches of {rows / batches:.1f} rows on average: equal "
            "queries or passages never share a batch, and a row needs others as negatives. Give more different pairs, or "
            f"choose another batch_size (now {args.batch_size})."
        )
    return found


class _Trainer(SentenceTransformerTrainer):
    """Save and load checkpoints of the training loop, which have no pickles."""

    stage: "_StageCallback"
    optimizer: Any
    lr_scheduler: Any

    def _save_checkpoint(self, *_: Any) -> None:
        self._tr_loss = reduce(self._tr_loss, reduction="mean")
        self.stage.check_finite(self._tr_loss.item(), self.state, self.lr_scheduler.get_last_lr()[0])
        scaler = self.accelerator.scaler
        state = {
            "losses": [self._tr_loss.item(), self._total_loss_scalar, self._globalstep_last_logged],
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "seconds": self.stage.seconds(),
            "evaluation": self.stage.evaluation,
        }
        files = {"trainer_state.json": asdict(self.state), "state.json": state}
        step, keep = self.state.global_step, self.stage.arguments.save_total_limit
        checkpoint.save(self.stage.root, step, self.model, files, optimizer=self.optimizer, keep=keep)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path, model: Any = None) -> None:
        load_model(self.model, Path(resume_from_checkpoint) / "model.safetensors")

    def _load_optimizer_and_scheduler(self, folder: Any) -> None:
        checkpoint.load_optimizer(Path(folder), self.optimizer)
        self.lr_scheduler.load_state_dict(self.stage.saved["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_scaler(self, _: Any) -> None:
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(self.stage.saved["scaler"])

    def _load_rng_state(self, _: Any) -> None:
        """Do nothing. Every step sets its own seed."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule of the training loop."""
        schedule = schedule_of(self.stage.arguments, num_training_steps)
        self.lr_scheduler = LambdaLR(self.optimizer, partial(schedule, peak=1.0))
        return self.lr_scheduler

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Do nothing. The model card is written when the model is published."""


class _StageCallback(ProgressCallback):
    """Evaluate and log during training, keep the best weights, and stop after Ctrl-C."""

    def __init__(self, trainer: _Trainer, args: EmbedStage, output_dir: Path, evaluate: Any):
        super().__init__()
        self.trainer, self.arguments, self.evaluate = trainer, args, evaluate
        self.start = time.perf_counter()
        self.log_file, self.root = output_dir / "log.jsonl", output_dir / "checkpoints"
        self.stop, self.interrupted = StopRequest(), 0
        self.saved: dict[str, Any] = {"losses": [0.0, 0.0, 0], "seconds": 0.0, "evaluation": {}}
        self.evaluation: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control)  # type: ignore[no-untyped-call]
        self.restore(state)

    def restore(self, state: Any) -> None:
        """Continue the log and the sums where the checkpoint was saved."""
        trainer = self.trainer
        loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = self.saved["losses"]
        trainer._tr_loss = torch.tensor(loss, device=trainer.accelerator.device)
        self.evaluation = self.saved["evaluation"]
        self.log = Log(trainer.accelerator, self.log_file, state.global_step)
        self.start = time.perf_counter() - self.saved["seconds"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seed_everything(args.seed, state.global_step, processes().process_index)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # The usual progress bar would print a line on standard output.
        if not logs or "loss" not in logs:
            return
        loss, rate, grad_norm = logs["loss"], logs["learning_rate"], float(logs.get("grad_norm", 0.0))
        # With fp16, the gradient scaler skips steps with infinite gradients.
        self.check_finite(loss + (0.0 if args.fp16 else grad_norm), state, rate)
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        line = {"step": state.global_step, "epoch": round(state.epoch, 4), "loss": loss, "learning_rate": rate}
        self.log.write({**line, "grad_norm": grad_norm, "seconds": self.seconds()})

    def check_finite(self, loss: float, state: Any, rate: float) -> None:
        """Raise FloatingPointError if the loss or its gradient is not finite."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss or its gradient is not finite near step {state.global_step} of {state.max_steps}, learning rate "
                f"{rate:.3g}. Lower learning_rate, or use precision: fp32. Checkpoints of earlier steps are not changed."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control)  # type: ignore[no-untyped-call]
        last = state.global_step >= state.max_steps
        control.should_log |= last
        every = self.arguments.eval_steps
        due = state.global_step % every == 0 if every else float(state.epoch).is_integer()
        if self.evaluate and (due or last):
            self.measure(state)
        if self.stopped_early(state):
            control.should_log = control.should_save = control.should_training_stop = True
        number = self.stop.agreed(state.global_step % args.logging_steps == 0)
        if number and not last:
            self.interrupted = number
            control.should_save = control.should_training_stop = True

    def measure(self, state: Any) -> None:
        """Evaluate the model, and save the weights if they are the best so far."""
        (metrics,) = broadcast_object_list([self.evaluate(self.trainer.model) if processes().is_main_process else None])
        self.evaluation = {f"eval_{name}": value for name, value in metrics.items()}
        self.log.write({"step": state.global_step, "epoch": round(state.epoch, 4), **self.evaluation})
        metric = self.arguments.metric_for_best
        value = metrics[metric] if metric else None
        if value is not None and (not self.best or value > self.best["metrics"][f"eval_{metric}"]):
            self.best = {"step": state.global_step, "metrics": self.evaluation}
            checkpoint.save(self.root, state.global_step, self.trainer.model, {"state.json": self.best})

    def stopped_early(self, state: Any) -> bool:
        """Return True if ``patience`` evaluations have followed the best one."""
        patience, step = self.arguments.patience, state.global_step
        every = self.arguments.eval_steps or round(step / (state.epoch or 1))
        return bool(patience and self.best and self.best["step"] + patience * every <= step < state.max_steps)

    def seconds(self) -> float:
        """Return the seconds of training. Interrupted runs count as well."""
        return round(time.perf_counter() - self.start, 3)

    def load_best(self) -> dict[str, Any]:
        """Load the best weights if they were saved, and return the metrics of the model."""
        if self.best is None:
            return self.evaluation
        load_model(self.trainer.model, self.root / f"best-{self.best['step']:08d}" / "model.safetensors")
        return {**self.best["metrics"], "best_step": self.best["step"]}
