"""Run a trainer of the sentence-transformers family as a stage of a recipe.

The trainer computes. This adapter adds the promises of a stage: checkpoints that are checked before they are used, the best
weights kept apart, ``log.jsonl``, a clean stop on Ctrl-C and SIGTERM, and a result that appears only when it is complete.
"""

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import ProgressCallback, TrainerCallback

from minibert.files.disk import read_json, write_json
from minibert.files.processes import processes
from minibert.train import checkpoint
from minibert.train.arguments import LoopArguments
from minibert.train.loop import Log, StopRequest, keep_memory
from minibert.train.stage import StageContext

logger = logging.getLogger(__name__)

# Names of schedules that differ in transformers.
_SCHEDULERS = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
# Ends of the names that the trainer adds to the metrics of an evaluation.
_TIMING = ("_runtime", "_per_second", "_time")


def run_trainer(
    trainer_class: type,
    options: Any,
    model: Any,
    args: LoopArguments,
    context: StageContext,
    *,
    train_dataset: Any,
    loss: Any,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """Train ``model``, or continue its training, and leave it as a complete folder in ``context.output_dir``.

    Args:
        trainer_class: ``SentenceTransformerTrainer`` or a class with the same base.
        options: the trainer's arguments, as :func:`trainer_arguments` makes them.
        evaluate: measures the model; larger metrics are better.
        metric: the metric of ``evaluate`` that picks the weights kept as the result; None keeps the last.

    Returns:
        Steps, epochs, training loss, seconds, parameters, and the metrics of ``evaluate`` as eval_NAME.

    Raises:
        FloatingPointError: the loss is not a finite number.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    keep_memory()
    callback = _StageCallback(args, context.output_dir, model, metric if evaluate else None)
    trainer = type(trainer_class.__name__, (_StageTrainer, trainer_class), {})(
        model=model,
        args=options,
        train_dataset=train_dataset,
        loss=loss,
        evaluator=_Evaluator(evaluate) if evaluate else None,
        callbacks=[callback],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_ProgressBar())
    callback.accelerator = trainer.accelerator
    with callback.stop.listening():
        result = trainer.train(resume_from_checkpoint=_latest_checkpoint(context.output_dir / "checkpoints"))
    state = trainer.state
    if callback.interrupted:
        message = f"Stopped at step {state.global_step} of {state.max_steps}, after saving a checkpoint."
        raise KeyboardInterrupt(message) if callback.interrupted == signal.SIGINT else SystemExit(128 + callback.interrupted)
    metrics = {
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 4),
        **callback.load_best(),
        "train_loss": result.training_loss,
        "train_seconds": callback.seconds(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if processes().is_main_process:
        final = context.output_dir / "checkpoints" / "final"
        checkpoint.write_folder(final, lambda folder: model.save_pretrained(str(folder), create_model_card=False))
        checkpoint.move_files(final, context.output_dir)
    return metrics


def trainer_arguments(arguments_class: Any, args: LoopArguments, context: StageContext, **options: Any) -> Any:
    """Translate the arguments of a stage into those of a trainer.

    Args:
        arguments_class: ``SentenceTransformerTrainingArguments`` or a class with the same base.
        options: fields that only this trainer has.
    """
    return arguments_class(
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
        use_cpu=not torch.accelerator.is_available(),  # explicit, because bf16 is refused without a GPU otherwise
        bf16=args.precision == "bf16",
        fp16=args.precision == "fp16",
        torch_compile=args.compile,
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
        **options,
    )


class _StageTrainer:
    """Methods of the trainer that a stage replaces."""

    args: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Tell transformers' warm-up-stable-decay schedule how many steps its decay takes."""
        options = self.args.lr_scheduler_kwargs
        if isinstance(options, dict) and "num_decay_steps" in options:  # a share of all steps until here
            decay = max(1, round(options["num_decay_steps"] * num_training_steps))
            self.args.lr_scheduler_kwargs = {**options, "num_decay_steps": decay}
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: a card is written when a model is published, from facts measured in the run."""


class _Evaluator(BaseEvaluator):
    def __init__(self, evaluate: Callable[[Any], dict[str, float]]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.evaluate = evaluate

    def __call__(self, model: Any, *_: Any, **__: Any) -> dict[str, float]:
        return dict(self.evaluate(model))


class _ProgressBar(ProgressCallback):
    """The usual progress bar, without the lines on standard output, which belongs to the result of the command."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)


class _StageCallback(TrainerCallback):
    """Write the log, keep the best weights, complete checkpoints, and stop after the step in which Ctrl-C came."""

    accelerator: Any  # the trainer's, which exists only after its callbacks

    def __init__(self, args: Any, output_dir: Path, model: Any, metric: str | None):
        self.measured, self.eval_steps = args.eval_data is not None, args.eval_steps
        self.log_file, self.best_folder = output_dir / "log.jsonl", output_dir / "checkpoints" / "best"
        self.model, self.metric = model, metric
        self.stop, self.interrupted = StopRequest(), 0
        self.evaluation: dict[str, float] = {}
        self.best: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log = Log(self.accelerator, self.log_file, state.global_step)
        lines = self.log_file.read_text(encoding="utf-8").splitlines() if processes().is_main_process else []
        earlier = [json.loads(line) for line in lines]
        self.start = time.perf_counter() - max((line.get("seconds", 0.0) for line in earlier), default=0.0)
        self.evaluation = next((metrics for line in reversed(earlier) if (metrics := _measured(line))), {})
        # Metrics of a later step belong to a checkpoint that was lost; they will be measured again.
        if state.global_step and self.best_folder.exists() and checkpoint.find_corruption(self.best_folder) is None:
            best = read_json(self.best_folder / "best.json")
            self.best = best if best["step"] <= state.global_step else None

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
        self.log.write({**line, "grad_norm": grad_norm, "seconds": self.seconds()})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.evaluation = _measured(metrics or {})
        self.log.write({"step": state.global_step, "epoch": round(state.epoch, 4), **self.evaluation})
        name = f"eval_{self.metric}"
        if self.metric is None or (self.best and self.evaluation[name] <= self.best["metrics"][name]):
            return
        self.best = {"step": state.global_step, "metrics": self.evaluation}
        if processes().is_main_process:

            def fill(folder: Path) -> None:
                save_weights(self.model, str(folder / "model.safetensors"))
                write_json(folder / "best.json", self.best)

            checkpoint.write_folder(self.best_folder, fill)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes().wait_for_everyone()  # each process writes a part of the checkpoint
        if processes().is_main_process:
            checkpoint.write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        # Measured here and not at the end of the epoch, which comes after the checkpoint of the step: a run that resumes from
        # that checkpoint would not know the metrics.
        due = state.global_step % self.eval_steps == 0 if self.eval_steps else float(state.epoch).is_integer()
        control.should_evaluate = self.measured and (due or last)
        number = self.stop.number
        if processes().num_processes > 1:  # they must stop at the same step, and asking at every step would cost time
            if state.global_step % args.logging_steps:
                return
            number = int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
        if number and not last:
            self.interrupted = number
            control.should_save = control.should_training_stop = True

    def seconds(self) -> float:
        """Return the seconds of training over all runs that led here."""
        return round(time.perf_counter() - self.start, 3)

    def load_best(self) -> dict[str, float]:
        """Load the best weights, if any were kept, into the model, and return the metrics of the weights it then has."""
        if self.best is None:
            return self.evaluation
        processes().wait_for_everyone()
        load_weights(self.model, self.best_folder / "model.safetensors")
        return {**self.best["metrics"], "best_step": self.best["step"]}


def _measured(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation without the times that the trainer adds."""
    return {name: value for name, value in metrics.items() if name.startswith("eval_") and not name.endswith(_TIMING)}


def _latest_checkpoint(root: Path) -> str | None:
    """Return the newest valid checkpoint; newer ones, which are damaged, are named in a warning and deleted."""
    state, found = processes(), None
    folders = sorted(root.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    problems = {folder: checkpoint.find_corruption(folder) for folder in folders}
    state.wait_for_everyone()  # every process has looked before a folder is deleted
    for folder, problem in problems.items():
        if problem is None:
            found = str(folder)
            break
        if state.is_main_process:
            logger.warning("%s It is not used.", problem)
            shutil.rmtree(folder)
    if found and state.is_main_process:
        logger.warning("Resuming from %s.", found)
    state.wait_for_everyone()
    return found
