"""Define and check the fields of a recipe: one model per kind of stage, one sentence per field."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from minibert.data.source import DataSource

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[str], Field(min_length=1)]
SampleBy = Annotated[
    Literal["line", "paragraph", "document"],
    Field(description="What a text is in .txt files: a line, a paragraph (up to an empty line) or the file."),
]
_BEST = "Metric that picks the checkpoint to keep."
_OR_LAST = " Null keeps the last."
# Marks a field that may differ when a run is resumed, because it does not change the
# result.
FREE = "free"


def _named_once(names: Any) -> Any:
    if isinstance(names, list) and (repeated := sorted({name for name in names if names.count(name) > 1})):
        raise ValueError(f"{', '.join(repeated)} is given more than once; give every name once.")
    return names


class Arguments(BaseModel):
    """Refuse unknown fields and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def free_fields(cls) -> set[str]:
        """Return the fields that may differ when a run is resumed."""
        return {name for name, field in cls.model_fields.items() if FREE in field.metadata}


_OneOrMore = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
DataSources = Annotated[list[DataSource], Field(min_length=1), _OneOrMore]


class NewModel(BaseModel):
    """New weights: a preset of ``MiniBertConfig`` and the fields that differ from it."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    preset: str = Field(description="Name of a MiniBertConfig preset; other keys replace its fields.")

    @model_validator(mode="after")
    def _can_be_built(self) -> "NewModel":
        self.config()
        return self

    def config(self, **changes: Any) -> Any:
        """Return the ``MiniBertConfig``, with ``changes`` to fields that the recipe leaves out."""
        from huggingface_hub.errors import StrictDataclassError

        from minibert.configuration_minibert import MiniBertConfig

        try:
            return MiniBertConfig.preset(self.preset, **{**changes, **(self.model_extra or {})})
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error.__cause__ or error).split())) from error


class Stage(Arguments):
    """The name of a stage, which every kind of stage has."""

    name: str = Field("", pattern=r"^[\w-]*$", description="Name of the stage in folders and overrides; unset means its kind.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {**value, "name": value.get("name") or value.get("kind", "")} if isinstance(value, dict) else value


def _model_form(value: Any) -> str:
    if value is None:
        return "none"
    return "new" if isinstance(value, dict | NewModel) else "text"


class ModelStage(Stage):
    """A stage that works on a model."""

    model: Annotated[
        Annotated[str, Tag("text")] | Annotated[NewModel, Tag("new")] | Annotated[None, Tag("none")], Discriminator(_model_form)
    ] = Field(
        None,
        description="An earlier stage's name, a folder or a Hub id; {preset: name, ...} starts from new weights; unset "
        "continues with the previous stage's model.",
    )
    tokenizer: str | None = Field(
        None, description="Folder or Hub id; unset: the model's own, or the latest tokenizer stage's for new weights."
    )


class LoopArguments(Arguments):
    """The settings of a training loop, which every stage that trains a model has."""

    batch_size: Positive = Field(32, description="Rows per step and process.")
    eval_batch_size: Annotated[Positive, FREE] = Field(64, description="Rows per evaluation step and process.")
    gradient_accumulation_steps: Positive = Field(1, description="Batches summed into one optimizer step.")
    epochs: float = Field(1, gt=0, description="Passes over the training data; fractions are allowed.")
    max_steps: Positive | None = Field(None, description="Stop after this many optimizer steps, whatever the epochs say.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    dropout: Share | None = Field(None, description="Dropout of hidden states and attention; unset keeps the model's.")
    weight_decay: float = Field(0.01, ge=0, description="Decay of matrices; biases and norms are never decayed.")
    adam_betas: tuple[Share, Share] = Field((0.9, 0.999), strict=False, description="Decay rates of AdamW's two averages.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Term that keeps AdamW's division finite.")
    warmup_ratio: Share = Field(0.0, description="Share of the steps over which the learning rate rises from zero.")
    warmup_steps: NotNegative | None = Field(None, description="Number of warm-up steps; use it or warmup_ratio, not both.")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="Course of the learning rate after warm-up; wsd is stable, then decays."
    )
    decay_ratio: float = Field(0.1, gt=0, le=1, description="Share of the steps over which wsd decays.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them alone.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Arithmetic of forward and backward passes; a warning says where bf16 is slower than fp32."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    log_steps: Annotated[Positive, FREE] = Field(50, description="Optimizer steps between two lines of log.jsonl.")
    eval_steps: Positive | None = Field(None, description="Steps between evaluations; unset means once per epoch.")
    save_steps: Annotated[Positive | None, FREE] = Field(None, description="Steps between checkpoints; unset: once per epoch.")
    save_total_limit: Annotated[Positive, FREE] = Field(2, description="Checkpoints kept on disk, in addition to the best.")
    seed: int | None = Field(None, ge=0, description="Seed of this stage; unset means the recipe's.")
    num_workers: Annotated[NotNegative, FREE] = Field(0, description="Additional processes that prepare batches.")
    trackers: Annotated[list[str], FREE] = Field([], description="Trackers of Accelerate to report to, such as tensorboard.")

    @model_validator(mode="after")
    def _one_warmup(self) -> "LoopArguments":
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both given; keep one of them.")
        return self

    @model_validator(mode="before")
    @classmethod
    def _without_fsdp(cls, value: Any) -> Any:
        if isinstance(value, dict) and "fsdp" in value:
            raise ValueError(
                "fsdp is not supported; leave it out. Each process holds the complete model, and "
                "several processes share the data: torchrun --nproc_per_node N -m minibert train RECIPE."
            )
        return value


class TrainStage(ModelStage, LoopArguments):
    """A stage that trains a model."""

    data: DataSources = Field(description="Training data.")
    eval_data: DataSources | None = Field(None, description="Data to measure on; unset means none.")
    max_length: Positive | None = Field(None, description="Longest sequence in tokens; unset means the model's positions.")


class TokenizerStage(Stage):
    """Train a tokenizer on the texts of some data."""

    kind: Literal["tokenizer"]
    data: DataSources = Field(description="Data whose texts are read.")
    text_columns: list[str] | None = Field(None, description="Columns to read; unset means every column of strings.")
    method: Literal["wordpiece", "word_level"] = Field("wordpiece", description="Subwords (BERT) or whole words as tokens.")
    vocab_size: Annotated[int, Field(ge=6)] = Field(30000, description="Largest vocabulary, special tokens included.")
    lowercase: bool = Field(True, description="Lower-case texts and strip accents.")
    min_frequency: Positive | None = Field(None, description="Rarer pieces are left out; unset means 2, and 1 for whole words.")
    max_length: Positive = Field(512, description="Longest sequence, in tokens, that the tokenizer announces.")
    truncation_side: Literal["right", "left"] = Field("right", description="Side that is cut off texts that are too long.")


class PhaseArguments(Arguments):
    """A phase of pretraining; the stage gives the values of unset fields."""

    share: float = Field(1.0, gt=0, description="Its share of the optimizer steps, relative to the other phases'.")
    max_length: Positive | None = Field(None, description="Length of its sequences in tokens.")
    batch_size: Positive | None = Field(None, description="Its rows per step and process.")
    learning_rate: float | None = Field(None, gt=0, description="Its peak learning rate.")


class MaskedWordArguments(Arguments):
    """Give the settings for masking words to every stage that predicts masked words."""

    sample_by: SampleBy = "paragraph"
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="Share of the tokens to predict.")
    mask_replace_prob: Share = Field(0.8, description="Share of the tokens to predict that become [MASK].")
    random_replace_prob: Share = Field(0.1, description="Share of the tokens to predict that become another word.")
    whole_word_mask: bool = Field(False, description="Mask all pieces of a word together.")
    preprocessing_num_workers: Annotated[Positive | None, FREE] = Field(
        None, description="Processes; unset: one per processor."
    )
    cache_dir: Annotated[str | None, FREE] = Field(
        None, description="Folder of tokenized text; unset: in the cache of datasets."
    )

    @model_validator(mode="after")
    def _replaced_at_most_once(self) -> "MaskedWordArguments":
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError("mask_replace_prob and random_replace_prob add up to more than 1; lower one of them.")
        return self


class PretrainStage(TrainStage, MaskedWordArguments):
    """Pretrain an encoder on raw text: masked language modelling, alone or with next-sentence prediction."""

    kind: Literal["pretrain"]
    text_column: str | None = Field(None, description="Column of documents; unset: text, or the only column of strings.")
    next_sentence: bool = Field(False, description="Also predict whether the second segment follows the first, as BERT did.")
    sentence_delimiters: str = Field(".!?", min_length=1, description="Characters that end a sentence, for next_sentence.")
    phases: list[PhaseArguments] | None = Field(
        None, min_length=1, description="Parts of the run, such as short sequences first and long ones later; unset: one."
    )
    metric_for_best: Literal["loss", "perplexity", "masked_accuracy", "next_sentence_accuracy"] | None = Field(
        None, description=_BEST + _OR_LAST
    )

    @model_validator(mode="after")
    def _measures_what_it_learns(self) -> "PretrainStage":
        if self.metric_for_best == "next_sentence_accuracy" and not self.next_sentence:
            raise ValueError(
                "metric_for_best: next_sentence_accuracy needs next_sentence: true; add it, or pick loss, perplexity or "
                "masked_accuracy."
            )
        return self


class ClassifyStage(TrainStage):
    """Fine-tune a classifier of single texts or of pairs: one label, several labels, or a number for each."""

    kind: Literal["classify"]
    text_columns: Names | None = Field(None, max_length=2, description="One column, or two for pairs; unset means detected.")
    label_column: str | Annotated[list[str], Field(min_length=1)] = Field(
        "label",
        description="Column of the class (a number, a string or a ClassLabel), of lists of classes, or of numbers to "
        "predict; several columns hold 0 or 1 each.",
    )
    labels: list[str] | None = Field(None, min_length=1, description="Names of the classes in order; unset: from the data.")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = Field(
        None,
        description="Unset: lists or several columns are multi-label, numbers with fractions regression.",
    )
    metric_for_best: str | None = Field(
        None,
        description="Metric that picks the checkpoint to keep: accuracy, macro_f1 or loss; multi-label micro_f1, "
        "macro_f1, subset_accuracy or loss; regression spearman, pearson or mse. Unset: the first.",
    )

    _names = field_validator("labels", "label_column")(_named_once)


class TagStage(TrainStage):
    """Fine-tune a tagger of words, such as named entities: lists of words, each word with a tag."""

    kind: Literal["tag"]
    token_column: str | None = Field(None, description="Column of lists of words; unset means tokens or words.")
    tag_column: str | None = Field(None, description="Column of lists of tags; unset: ner_tags, tags, pos_tags or labels.")
    labels: list[str] | None = Field(None, min_length=2, description="Names of the tags in order; unset: from the data.")
    max_length: Positive | None = Field(None, description="Tokens of a window; unset means the model's positions.")
    metric_for_best: str | None = Field(
        None,
        description="Metric that picks the checkpoint to keep: f1, precision, recall, accuracy or loss; for tags "
        "that mark no entities accuracy, macro_f1 or loss. Unset: the first.",
    )

    _names = field_validator("labels")(_named_once)


class AnswerStage(TrainStage):
    """Fine-tune extractive question answering: the answer is a span of the context, or there is none."""

    kind: Literal["answer"]
    data: DataSources = Field(description="Training data: question, context and answers {text: [...], answer_start: [...]}.")
    doc_stride: NotNegative | None = Field(None, description="Tokens that windows share; unset: a third of max_length.")
    max_question_length: Positive | None = Field(
        None, description="Questions are cut after this many tokens; unset: 64, but at most a third of max_length."
    )
    max_answer_length: Positive = Field(30, description="Longest answer that is given, in tokens.")
    null_threshold: float | None = Field(
        None,
        description="How much higher than the best span 'no answer' must score; unset: 0 where the training data has "
        "questions without answer, else it never wins.",
    )
    metric_for_best: Literal["f1", "exact_match"] = Field("f1", description=_BEST)


class ChooseStage(TrainStage):
    """Fine-tune multiple choice: one of several answers or endings, each read together with the question."""

    kind: Literal["choose"]
    text_columns: list[str] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="What is asked: one column, or two of which the second begins every choice; unset means detected.",
    )
    choice_columns: Names | None = Field(None, description="One column of lists, or a column per choice; unset means detected.")
    label_column: str = Field("label", description="Column of the right choice: a number from 0, or a letter from A.")
    metric_for_best: Literal["accuracy", "loss"] = Field("accuracy", description=_BEST)


class PairSource(DataSource):
    """A source of pairs, or of the plain texts that pairs are made of."""

    make_pairs: bool | None = Field(None, description="Make the pairs of plain text; unset means as the stage says.")
    hard_negatives: NotNegative | None = Field(None, description="Hard negatives per pair; unset means as the stage says.")

    @model_validator(mode="before")
    @classmethod
    def _from_any_source(cls, value: Any) -> Any:
        return value.model_dump() if type(value) is DataSource else value


class EmbedStage(TrainStage):
    """Train sentence embeddings on pairs (or triplets) with in-batch negatives, by sentence-transformers' trainer."""

    kind: Literal["embed"]
    data: Annotated[list[PairSource], Field(min_length=1), _OneOrMore] = Field(  # type: ignore[assignment]  # a list is invariant
        description="Pairs, or texts with make_pairs."
    )
    eval_data: DataSources | None = Field(None, description="Pairs to measure retrieval on; unset means none.")
    make_pairs: bool = Field(
        False,
        description="Make the pairs of plain text: some words of each sentence ask for it, at times with its neighbours "
        "(languages with spaces). A source may say it for itself: data: [QUESTIONS, {path: TEXTS, make_pairs: true}].",
    )
    text_column: str | None = Field(None, description="make_pairs: column of texts; unset: text, or the only string column.")
    sample_by: SampleBy = "paragraph"
    anchor_column: str | None = Field(None, description="Column of queries; unset means the first column of strings.")
    positive_column: str | None = Field(None, description="Column of passages; unset means the second column of strings.")
    negative_column: str | None = Field(None, description="Column of hard negatives; unset means none are used.")
    hard_negatives: NotNegative = Field(
        0,
        description="Hard negatives per pair, mined with the model as it is before training. With one_source_per_batch a "
        "source may say it for itself.",
    )
    loss: Literal["mnrl", "cached_mnrl"] = Field(
        "mnrl", description="Multiple negatives ranking, plain or cached (large batches in little memory)."
    )
    mini_batch_size: Positive = Field(32, description="Rows computed at once by cached_mnrl.")
    scale: float = Field(20.0, gt=0, description="Cosine similarities are multiplied by this (inverse temperature).")
    gather_across_devices: bool = Field(False, description="Use the other processes' passages as negatives too.")
    batch_sampler: Literal["no_duplicates", "batch_sampler"] = Field(
        "no_duplicates",
        description="no_duplicates keeps equal texts out of one batch, where they would be false negatives.",
    )
    one_source_per_batch: bool = Field(False, description="Fill each batch from one source: like texts are harder negatives.")
    pooling: Literal["cls", "mean"] | None = Field(None, description="Vector that stands for a text; unset: the model's.")
    normalize: bool = Field(True, description="Scale vectors to length 1.")
    metric_for_best: Literal["mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100"] | None = Field(
        "mrr@10", description=_BEST + _OR_LAST
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "EmbedStage":
        mined = {self.hard_negatives_of(source) for source in self.data}
        if any(mined) and self.negative_column:
            raise ValueError("negative_column names hard negatives, while hard_negatives mines them; set only one of the two.")
        if len(mined) > 1 and not self.one_source_per_batch:
            raise ValueError(
                f"The sources have {' and '.join(map(str, sorted(mined)))} hard_negatives per pair, "
                "which do not fit into one batch; set one_source_per_batch: true, or give all the same."
            )
        made = [self.makes_pairs_of(source) for source in self.data]
        useless = ("anchor_column", "positive_column", "negative_column") if all(made) else ("negative_column",)
        if any(made) and (named := [name for name in useless if getattr(self, name)]):
            raise ValueError(f"make_pairs makes queries and passages of plain text, so {' and '.join(named)} must be left out.")
        if not any(made) and (self.text_column or self.sample_by != "paragraph"):
            raise ValueError(
                "text_column and sample_by are there for make_pairs: true; name columns of pairs by anchor_column and "
                "positive_column."
            )
        return self

    def makes_pairs_of(self, source: PairSource) -> bool:
        """Return True if ``source`` holds plain texts."""
        return self.make_pairs if source.make_pairs is None else source.make_pairs

    def hard_negatives_of(self, source: PairSource) -> int:
        """Return the number of hard negatives to mine for each pair of ``source``."""
        return self.hard_negatives if source.hard_negatives is None else source.hard_negatives


class DistillStage(TrainStage):
    """Teach a smaller model the outputs of a larger one."""

    kind: Literal["distill"]
    teacher: str = Field(
        min_length=1,
        description="An earlier stage's name, a folder or a Hub id: a classifier, a MiniBERT that predicts words, or a "
        "sentence-transformers model.",
    )
    student_layers: Positive | Annotated[list[NotNegative], Field(min_length=1)] | None = Field(
        None,
        description="Start from this number of the teacher's layers, spread evenly, or from those listed, counted from 0.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "DistillStage":
        if self.model is not None and self.student_layers is not None:
            raise ValueError(
                "model and student_layers are both given; keep model to start from it, or "
                "student_layers to start from the teacher's layers."
            )
        weights = [name for name in type(self).model_fields if name.endswith("_weight")]
        if weights and not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0, so there is nothing to learn; raise one of them.")
        return self


class DistillTaskStage(DistillStage):
    """Teach a classifier the teacher's classes and the labels of the data."""

    objective: Literal["task"]
    text_columns: Names | None = Field(None, max_length=2, description="One column, or two for pairs; unset means detected.")
    label_column: str = Field("label", description="Column of the class (a number, a string or a ClassLabel).")
    labels: list[str] | None = Field(None, min_length=2, description="Names of the classes in order; unset: the data's.")
    metric_for_best: Literal["accuracy", "macro_f1", "loss"] = Field("accuracy", description=_BEST)
    temperature: float = Field(2.0, gt=0, description="Divides logits before they are compared.")
    alpha: Share = Field(0.5, description="Share of the teacher in the loss; the rest is the labels'.")

    _names = field_validator("labels")(_named_once)


class DistillPretrainingStage(DistillStage, MaskedWordArguments):
    """Teach a language model the teacher's masked words, the words themselves and the teacher's hidden states."""

    objective: Literal["pretraining"]
    text_columns: list[str] | None = Field(
        None, min_length=1, max_length=1, description="The column of documents; unset: text, or the only column of strings."
    )
    metric_for_best: Literal["loss", "perplexity", "masked_accuracy"] = Field("loss", description=_BEST)
    temperature: float = Field(2.0, gt=0, description="Divides logits before they are compared.")
    kl_weight: float = Field(5.0, ge=0, description="Weight of the teacher's distribution of masked words.")
    mlm_weight: float = Field(2.0, ge=0, description="Weight of the masked words themselves.")
    cosine_weight: float = Field(1.0, ge=0, description="Weight of the cosine to the teacher's last states.")

    @property
    def text_column(self) -> str | None:
        """Return the column under the name that ``pretrain`` gives it."""
        return self.text_columns[0] if self.text_columns else None


class DistillEmbeddingStage(DistillStage):
    """Teach an embedding model the teacher's vectors of unlabelled texts, and the similarities between them."""

    objective: Literal["embedding"]
    text_columns: Names | None = Field(None, description="Columns whose texts are read; unset: all columns of strings.")
    sample_by: SampleBy = "paragraph"
    split_lines: bool = Field(False, description="Each line of a text is a text of its own.")
    max_length: Positive | None = Field(None, description="Longest sequence in tokens; unset means the teacher's.")
    metric_for_best: str = Field(
        "score",
        description=_BEST + " The score is the mean of spearman and ndcg@10 over the data sets of eval_data.",
    )
    vector_loss: Literal["cosine", "mse"] = Field("cosine", description="One minus the cosine, or the squared distance.")
    vector_weight: float = Field(1.0, ge=0, description="Weight of vector_loss.")
    similarity_weight: float = Field(1.0, ge=0, description="Weight of the squared error of cosines between texts of a batch.")
    hidden_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared error of hidden states; both models must read the same tokens, and the teacher "
        "runs at every step.",
    )
    matryoshka_dims: list[Positive] | None = Field(None, min_length=1, description="Lengths of prefixes that learn the same.")
    pooling: Literal["cls", "mean"] | None = Field(None, description="Vector of a text; unset: as the teacher does.")
    normalize: bool | None = Field(None, description="Scale vectors to length 1; unset: as the teacher does.")


class EvaluateStage(ModelStage):
    """Measure a model: retrieval, similarity or classification, according to the columns of each data set."""

    kind: Literal["evaluate"]
    data: DataSources = Field(description="Data sets to measure on.")
    baselines: bool = Field(True, description="Also measure BM25 and an untrained model, for retrieval.")
    limit: Positive | None = Field(None, description="Measure on at most this many rows of each data set.")
    batch_size: Positive = Field(64, description="Texts encoded at once.")


# The arguments of each kind of stage, and those of ``distill`` by objective.
KINDS: dict[str, type[Stage]] = {
    "tokenizer": TokenizerStage,
    "pretrain": PretrainStage,
    "classify": ClassifyStage,
    "tag": TagStage,
    "answer": AnswerStage,
    "choose": ChooseStage,
    "embed": EmbedStage,
    "distill": DistillStage,
    "evaluate": EvaluateStage,
}
OBJECTIVES: dict[str, type[DistillStage]] = {
    "task": DistillTaskStage,
    "pretraining": DistillPretrainingStage,
    "embedding": DistillEmbeddingStage,
}
_Distill = Annotated[Union[tuple(OBJECTIVES.values())], Field(discriminator="objective")]  # type: ignore[valid-type]  # noqa: UP007
AnyStage: Any = Annotated[Union[tuple({**KINDS, "distill": _Distill}.values())], Field(discriminator="kind")]  # noqa: UP007


class Recipe(Arguments):
    """A named list of stages, run in order."""

    name: str = Field(pattern=r"^[\w.-]+$", description="Name of the recipe, and of its folder under runs/.")
    seed: int = Field(42, ge=0, description="Seed of every stage that names none.")
    output_dir: str | None = Field(None, min_length=1, description="Folder of the run; unset means runs/<name>.")
    stages: list[AnyStage] = Field(min_length=1, description="Stages in the order they run.")

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "Recipe":
        problems = list(_misfits(self.stages))
        if problems:
            raise ValueError(" ".join(problems))
        return self


def _misfits(stages: list[Any]) -> Iterator[str]:
    names: set[str] = set()
    has_tokenizer = has_model = False
    for number, stage in enumerate(stages, start=1):
        where = f"Stage {number} ({stage.name})"
        if stage.name in names:
            yield f"{where} has the name of an earlier stage; give it its own with name:."
        names.add(stage.name)
        if isinstance(stage, TokenizerStage):
            has_tokenizer = True
            continue
        taught = isinstance(stage, DistillStage)  # may start from its teacher's layers, and reads with its tokenizer
        if stage.model is None and not has_model and not (taught and stage.student_layers):
            layers = " or student_layers: 3" if taught else ""
            yield f"{where} has no model to start from; give model: {{preset: search-8x768}}, a folder or a Hub id{layers}."
        if isinstance(stage.model, NewModel) and not has_tokenizer and stage.tokenizer is None and not taught:
            yield f"{where} starts from new weights without a tokenizer; add a tokenizer stage before it or give tokenizer:."
        has_model = has_model or not isinstance(stage, EvaluateStage)
