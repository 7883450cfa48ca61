"""Define and validate the fields of a recipe. Each kind of stage has its own pydantic model."""

from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from minibert.data.source import DataSource

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[str], Field(min_length=1)]
SampleBy = Annotated[
    Literal["line", "paragraph", "document"],
    Field(description="Unit of text in .txt files: a line, a paragraph (up to an empty line) or the file."),
]
_BEST = "Metric that selects the checkpoint to keep."
_OR_LAST = " Null keeps the last checkpoint."
# Fields with this mark may change when a run is resumed. They do not affect the result.
FREE = "free"


def _named_once(names: Any) -> Any:
    if isinstance(names, list) and (repeated := sorted({name for name in names if names.count(name) > 1})):
        raise ValueError(f"{', '.join(repeated)} is given more than once; give each name once.")
    return names


_Once = AfterValidator(_named_once)


class Arguments(BaseModel):
    """Validate a part of a recipe. Unknown fields and values of a wrong type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def free_fields(cls) -> set[str]:
        """Return the names of the fields that may change when a run is resumed."""
        return {name for name, field in cls.model_fields.items() if FREE in field.metadata}


_LargestFirst = AfterValidator(lambda sizes: sorted(set(sizes), reverse=True))
_OneOrMore = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
DataSources = Annotated[list[DataSource], Field(min_length=1), _OneOrMore]


class NewModel(BaseModel):
    """Describe a new model by a preset of ``MiniBertConfig`` and by fields that override it."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    preset: str = Field(description="Name of a MiniBertConfig preset. Other keys replace preset fields.")

    @model_validator(mode="after")
    def _can_be_built(self) -> "NewModel":
        self.config()
        return self

    def config(self, **changes: Any) -> Any:
        """Return the model configuration. Fields in the recipe override ``changes``."""
        from huggingface_hub.errors import StrictDataclassError

        from minibert.configuration_minibert import MiniBertConfig

        try:
            return MiniBertConfig.preset(self.preset, **{**changes, **(self.model_extra or {})})
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error.__cause__ or error).split())) from error


class Stage(Arguments):
    """Represent a stage of a recipe. Every stage has a name."""

    name: str = Field("", pattern=r"^[\w-]*$", description="Name in folders and overrides. Unset: the kind.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {**value, "name": value.get("name") or value.get("kind", "")} if isinstance(value, dict) else value


def _model_form(value: Any) -> str:
    if value is None:
        return "none"
    return "new" if isinstance(value, dict | NewModel) else "text"


class ModelStage(Stage):
    """Represent a stage that trains or evaluates a model."""

    model: Annotated[
        Annotated[str, Tag("text")] | Annotated[NewModel, Tag("new")] | Annotated[None, Tag("none")], Discriminator(_model_form)
    ] = Field(
        None,
        description="Name of an earlier stage, folder or Hub id. {preset: name, ...} makes new weights. "
        "Unset: the model of the previous stage.",
    )
    tokenizer: str | None = Field(
        None, description="Folder or Hub id. Unset: the model's; for new weights, the last tokenizer stage's."
    )


class LoopArguments(Arguments):
    """Configure the training loop. Every stage that trains a model has these fields."""

    batch_size: Positive = Field(32, description="Rows per batch and process.")
    eval_batch_size: Annotated[Positive, FREE] = Field(64, description="Rows per evaluation batch.")
    gradient_accumulation_steps: Positive = Field(1, description="Batches per optimizer step and process.")
    epochs: float = Field(1, gt=0, description="Passes over the training data. Fractions are allowed.")
    max_steps: Positive | None = Field(None, description="Number of optimizer steps. It overrides epochs.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    dropout: Share | None = Field(None, description="Dropout of states and attention. Unset: the model's.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of matrices, not of biases and norms.")
    adam_betas: tuple[Share, Share] = Field((0.9, 0.999), strict=False, description="Betas of AdamW.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Epsilon of AdamW, which avoids a division by zero.")
    warmup_ratio: Share = Field(0.0, description="Share of the steps in which the learning rate warms up.")
    warmup_steps: NotNegative | None = Field(None, description="Warm-up steps, instead of warmup_ratio.")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="Learning rate after warm-up. wsd stays at the peak and decays at the end."
    )
    decay_ratio: float = Field(0.1, gt=0, le=1, description="Share of the steps in which wsd decays.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this norm. 0 disables clipping.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of forward and backward passes. bf16 warns if fp32 is faster."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    log_steps: Annotated[Positive, FREE] = Field(50, description="Steps between two lines of log.jsonl.")
    eval_steps: Positive | None = Field(None, description="Steps between evaluations. Unset: once per epoch.")
    patience: Positive | None = Field(None, description="Stop after this number of evaluations without improvement.")
    save_steps: Annotated[Positive | None, FREE] = Field(None, description="Save interval. Unset: one epoch.")
    save_total_limit: Annotated[Positive, FREE] = Field(2, description="Checkpoints to keep, plus the best.")
    seed: int | None = Field(None, ge=0, description="Seed of this stage. Unset: the seed of the recipe.")
    num_workers: Annotated[NotNegative, FREE] = Field(0, description="Worker processes that make batches.")
    trackers: Annotated[list[str], FREE] = Field([], description="Accelerate trackers, such as tensorboard.")

    @model_validator(mode="after")
    def _fields_agree(self) -> "LoopArguments":
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both set; remove one of the two fields.")
        lasts = isinstance(self, PretrainStage | EmbedStage) and self.metric_for_best is None  # others choose a metric
        if self.patience and (lasts or not getattr(self, "eval_data", True)):
            raise ValueError("patience needs eval_data and metric_for_best; set both, or remove patience.")
        return self


class TrainStage(ModelStage, LoopArguments):
    """Represent a stage that trains a model on data."""

    data: DataSources = Field(description="Training data.")
    eval_data: DataSources | None = Field(None, description="Data for the evaluation. Unset: no evaluation.")
    max_length: Positive | None = Field(None, description="Maximum length in tokens. Unset: model's limit.")


class TokenizerStage(Stage):
    """Configure the training of a tokenizer."""

    kind: Literal["tokenizer"]
    data: DataSources = Field(description="Data with texts to train on.")
    text_columns: list[str] | None = Field(None, description="Columns to read. Unset: all string columns.")
    method: Literal["wordpiece", "word_level"] = Field("wordpiece", description="Tokens: subwords or words.")
    vocab_size: Annotated[int, Field(ge=6)] = Field(30000, description="Maximum size, with special tokens.")
    lowercase: bool = Field(True, description="Convert texts to lower case.")
    strip_accents: bool | None = Field(None, description="Strip accents. Unset: with lowercase, unless words lose letters.")
    min_frequency: Positive | None = Field(None, description="Drop rarer tokens. Unset: 2 (word_level: 1).")
    max_length: Positive = Field(512, description="Maximum length in tokens, saved with the tokenizer.")
    truncation_side: Literal["right", "left"] = Field("right", description="Side where long texts are cut.")


class PhaseArguments(Arguments):
    """Configure a phase of pretraining. The stage supplies the values of unset fields."""

    share: float = Field(1.0, gt=0, description="Relative share of the optimizer steps of the stage.")
    max_length: Positive | None = Field(None, description="Maximum length of sequences in tokens.")
    batch_size: Positive | None = Field(None, description="Rows per batch and process.")
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate of the phase.")


class MaskedWordArguments(Arguments):
    """Configure masking for the stages that learn to predict masked words."""

    sample_by: SampleBy = "paragraph"
    mlm_probability: float = Field(0.15, gt=0, lt=1, description="Share of the tokens to predict.")
    mask_replace_prob: Share = Field(0.8, description="Share of predicted tokens that become [MASK].")
    random_replace_prob: Share = Field(0.1, description="Share of predicted tokens that become another word.")
    whole_word_mask: bool = Field(False, description="Mask all tokens of a word together.")
    preprocessing_num_workers: Annotated[Positive | None, FREE] = Field(
        None, description="Processes that tokenize. Unset: one per CPU."
    )
    cache_dir: Annotated[str | None, FREE] = Field(None, description="Cache. Unset: in the datasets cache.")

    @model_validator(mode="after")
    def _replaced_at_most_once(self) -> "MaskedWordArguments":
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError("mask_replace_prob + random_replace_prob must be at most 1; lower one of these fields.")
        return self


class PretrainStage(TrainStage, MaskedWordArguments):
    """Configure masked language modelling with optional next-sentence prediction."""

    kind: Literal["pretrain"]
    text_column: str | None = Field(None, description="Text column. Unset: text, or the only string column.")
    next_sentence: bool = Field(False, description="Also predict if the second segment follows the first.")
    sentence_delimiters: str = Field(".!?", min_length=1, description="Characters that end a sentence.")
    phases: list[PhaseArguments] | None = Field(
        None, min_length=1, description="Parts of the run, such as short rows and then long rows. Unset: one."
    )
    metric_for_best: Literal["loss", "perplexity", "masked_accuracy", "next_sentence_accuracy"] | None = Field(
        None, description=_BEST + _OR_LAST
    )

    @model_validator(mode="after")
    def _measures_what_it_learns(self) -> "PretrainStage":
        if self.metric_for_best == "next_sentence_accuracy" and not self.next_sentence:
            raise ValueError("metric_for_best: next_sentence_accuracy needs next_sentence: true, or choose another metric.")
        return self


class ClassifyStage(TrainStage):
    """Configure a classifier or a regression model for texts or pairs of texts."""

    kind: Literal["classify"]
    text_columns: Names | None = Field(None, max_length=2, description="One or two columns. Unset: detected.")
    label_column: Annotated[str | Names, _Once] = Field(
        "label",
        description="Column of the class (number, string or ClassLabel), of lists of classes, or of numbers "
        "to predict. Several columns must contain only 0 and 1.",
    )
    labels: Annotated[list[str] | None, _Once] = Field(None, min_length=1, description="Class names in order. Unset: detected.")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = Field(
        None,
        description="Unset: multi-label for lists or many columns, regression for fractions, else one label.",
    )
    class_weights: str | dict[Any, Any] | None = Field(None, description="Weights in the loss: balanced, or {class: weight}.")
    metric_for_best: str | None = Field(
        None,
        description="Metric that selects the checkpoint to keep. One label: accuracy, macro_f1 or loss. "
        "Multi-label: micro_f1, macro_f1, subset_accuracy or loss. Regression: spearman, pearson or mse. "
        "Unset: the first.",
    )


class TagStage(TrainStage):
    """Configure a tagger of words, for example for named entities. Each word has one tag."""

    kind: Literal["tag"]
    token_column: str | None = Field(None, description="Column of lists of words. Unset: tokens or words.")
    tag_column: str | None = Field(None, description="Tag column. Unset: ner_tags, tags, pos_tags or labels.")
    labels: Annotated[list[str] | None, _Once] = Field(None, min_length=2, description="Tag names in order. Unset: detected.")
    class_weights: str | dict[Any, Any] | None = Field(None, description="Weights in the loss: balanced, or {class: weight}.")
    max_length: Positive | None = Field(None, description="Tokens per window. Unset: the model's limit.")
    metric_for_best: str | None = Field(
        None,
        description="Metric that selects the checkpoint to keep. Entity tags: f1, precision, recall, "
        "accuracy or loss. Other tags: accuracy, macro_f1 or loss. Unset: the first.",
    )


class AnswerStage(TrainStage):
    """Configure extractive question answering. An answer is a span of the context, or empty."""

    kind: Literal["answer"]
    data: DataSources = Field(description="Columns question, context, answers {text: [], answer_start: []}.")
    doc_stride: NotNegative | None = Field(None, description="Window overlap. Unset: a third of max_length.")
    max_question_length: Positive | None = Field(
        None, description="Tokens kept of a question. Unset: 64, but at most a third of max_length."
    )
    max_answer_length: Positive = Field(30, description="Maximum length of a predicted answer in tokens.")
    null_threshold: float | None = Field(
        None,
        description="Margin by which 'no answer' must score higher than the best span. Unset: 0 if some "
        "training questions have no answer, otherwise a span is always returned.",
    )
    metric_for_best: Literal["f1", "exact_match"] = Field("f1", description=_BEST)


class ChooseStage(TrainStage):
    """Configure multiple choice. The model reads the question together with each choice."""

    kind: Literal["choose"]
    text_columns: list[str] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="Column of the question. A second column is put before each choice. Unset: detected.",
    )
    choice_columns: Names | None = Field(None, description="A column of lists, or several. Unset: detected.")
    label_column: str = Field("label", description="Column of the right choice: number from 0, or letter.")
    metric_for_best: Literal["accuracy", "loss"] = Field("accuracy", description=_BEST)


# What each loss of ``embed`` needs besides two texts. The first ones take negatives from the batch.
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mnrl", "cached_mnrl", "gist", "cached_gist"), ()),
    **dict.fromkeys(("cosent", "angle", "cosine_mse"), ("score",)),
    "triplet": ("negative",),
    "margin_mse": ("negative", "score"),
}


def _known_loss(loss: str) -> str:
    if loss not in NEEDS:
        reason = "tsdae needs a decoder class, which this package lacks" if loss == "tsdae" else f"{loss!r} is unknown"
        raise ValueError(f"{reason}; choose one of {', '.join(NEEDS)}.")
    return loss


LossName = Annotated[str, AfterValidator(_known_loss)]


class PairSource(DataSource):
    """Describe a data set of pairs, or of texts from which pairs are made."""

    loss: LossName | None = Field(None, description="Loss of this source. Unset: the stage's value.")
    make_pairs: bool | None = Field(None, description="Make pairs from texts. Unset: the stage's value.")
    hard_negatives: NotNegative | None = Field(None, description="Number per pair. Unset: the stage's value.")


class EmbedStage(TrainStage):
    """Configure sentence-transformers training on pairs, pairs with scores, or triplets."""

    kind: Literal["embed"]
    data: Annotated[list[PairSource], Field(min_length=1), _OneOrMore] = Field(  # type: ignore[assignment]  # a list is invariant
        description="Data with the columns of the loss, or plain texts with make_pairs."
    )
    eval_data: DataSources | None = Field(None, description="Data for metric_for_best. Unset: no evaluation.")
    make_pairs: bool = Field(
        False, description="Make pairs from plain text (languages with spaces): some words of a sentence have to find it."
    )
    text_column: str | None = Field(None, description="Text column. Unset: text, or the only string column.")
    sample_by: SampleBy = "paragraph"
    anchor_column: str | None = Field(None, description="Column of queries. Unset: of two string columns, query or question.")
    positive_column: str | None = Field(None, description="Passages. Unset: the other string column.")
    negative_column: str | None = Field(None, description="Hard negatives. Unset: negative, if the loss needs them.")
    score_column: str | None = Field(None, description="Scores. Unset: score, label, similarity or relevance.")
    hard_negatives: NotNegative = Field(
        0, description="Hard negatives per pair, mined once with the model before training. A source can set its own number."
    )
    loss: LossName = Field(
        "mnrl",
        description="Pairs: mnrl or gist; cached_ saves memory. Pairs with scores: cosent, angle or cosine_mse. Triplets: "
        "triplet or margin_mse. The table below tells them apart.",
    )
    guide: str | None = Field(None, min_length=1, description="Embedding model of gist: earlier stage, folder or Hub id.")
    teacher: str | None = Field(None, min_length=1, description="Embedding model that scores margin_mse. Unset: score_column.")
    matryoshka_dims: Annotated[list[Positive], Field(min_length=1), _LargestFirst] | None = Field(
        None, description="Lengths of prefixes of the vectors to train, as [384, 64]. The model cuts vectors to the largest."
    )
    query_prompt: str | None = Field(None, description="Text before queries, saved as prompt query. Unset: the model's.")
    passage_prompt: str | None = Field(None, description="Text before passages, saved as prompt document. Unset: the model's.")
    mini_batch_size: Positive = Field(32, description="Rows that cached losses compute at once.")
    mini_batch_tokens: Positive | None = Field(None, description="Tokens per mini-batch, instead of mini_batch_size.")
    scale: float = Field(20.0, gt=0, description="Factor of the cosine similarities (inverse temperature).")
    triplet_margin: float = Field(5.0, gt=0, description="Margin of Euclidean distances, at most 2 for vectors of length 1.")
    gather_across_devices: bool = Field(False, description="Use passages of all processes as negatives.")
    batch_sampler: Literal["no_duplicates", "batch_sampler"] = Field(
        "no_duplicates",
        description="no_duplicates avoids equal texts in a batch, because they would be false negatives.",
    )
    one_source_per_batch: bool = Field(False, description="Take all rows of a batch from one source, as different losses do.")
    pooling: Literal["cls", "mean"] | None = Field(None, description="Pooling method. Unset: the model's.")
    normalize: bool = Field(True, description="Scale vectors to length 1.")
    metric_for_best: Literal["mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100", "spearman", "accuracy"] | None = Field(
        "mrr@10", description=_BEST + " Data with scores have spearman, triplets accuracy, other pairs the rest." + _OR_LAST
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "EmbedStage":
        losses = {self.value_of(source, "loss") for source in self.data}
        mined = {self.value_of(source, "hard_negatives") for source in self.data}
        self.one_source_per_batch |= len(losses) > 1 or len(mined) > 1
        if "batch_sampler" not in self.model_fields_set and all(NEEDS[loss] for loss in losses):
            self.batch_sampler = "batch_sampler"
        if "metric_for_best" not in self.model_fields_set and NEEDS[self.loss] in (("score",), ("negative",)):
            self.metric_for_best = "accuracy" if self.loss == "triplet" else "spearman"
        if losses & {"gist", "cached_gist"} and not self.guide:
            raise ValueError("loss: gist needs a model that finds false negatives; set guide: to an embedding model.")
        if (self.query_prompt or self.passage_prompt) and all(NEEDS[loss] == ("score",) for loss in losses):
            raise ValueError("Pairs with scores have no queries and passages; remove query_prompt and passage_prompt.")
        if any(mined) and self.negative_column:
            raise ValueError("negative_column and hard_negatives are both set; remove one of the two fields.")
        made = [self.value_of(source, "make_pairs") for source in self.data]
        used = not all(made) or self.eval_data is not None  # eval_data has pairs in any case
        useless = ("negative_column",) if used else ("anchor_column", "positive_column", "negative_column")
        if any(made) and (named := [name for name in useless if getattr(self, name)]):
            raise ValueError(f"make_pairs makes queries and passages itself; remove {' and '.join(named)}.")
        if not any(made) and (self.text_column or self.sample_by != "paragraph"):
            raise ValueError("text_column and sample_by need make_pairs: true; pairs have anchor_column and positive_column.")
        for source in self.data:
            loss, needs = self.value_of(source, "loss"), self.needs_of(source)
            number = self.value_of(source, "hard_negatives")
            most = 0 if "score" in needs else 1 if loss in ("gist", "triplet") else number
            if number > most:
                raise ValueError(f"loss: {loss} takes at most {most} hard_negatives per pair, got {number}; lower the number.")
            if self.value_of(source, "make_pairs") and needs:
                raise ValueError(f"make_pairs makes no {' and no '.join(sorted(needs))} for loss: {loss}; choose mnrl.")
        return self

    def value_of(self, source: PairSource, field: str) -> Any:
        """Return ``field`` of ``source``, or the stage's value if the source does not set it."""
        value = getattr(source, field)
        return getattr(self, field) if value is None else value

    def needs_of(self, source: PairSource) -> set[str]:
        """Return what ``source`` must contain besides two texts: a negative, a score, or both."""
        needs = {*NEEDS[self.value_of(source, "loss")]}
        if self.value_of(source, "hard_negatives"):
            needs.discard("negative")
        elif self.negative_column and not needs:
            needs.add("negative")
        return needs - {"score"} if self.teacher and self.value_of(source, "loss") == "margin_mse" else needs


class DistillStage(TrainStage):
    """Configure distillation. A smaller student learns the outputs of a larger teacher."""

    kind: Literal["distill"]
    teacher: str = Field(
        min_length=1,
        description="Name of an earlier stage, folder or Hub id. The model is a classifier, a MiniBERT that "
        "predicts words, or a sentence-transformers model.",
    )
    student_layers: Positive | Annotated[list[NotNegative], Field(min_length=1)] | None = Field(
        None,
        description="Copy layers of the teacher: a number, spread evenly, or a list of layers from 0.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "DistillStage":
        if self.model is not None and self.student_layers is not None:
            raise ValueError(
                "model and student_layers are both set; remove one of the two fields. With student_layers, "
                "the student starts from layers of the teacher."
            )
        weights = [name for name in type(self).model_fields if name.endswith("_weight")]
        if weights and not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0, so nothing is learned; increase one.")
        return self


class DistillTaskStage(DistillStage):
    """Configure distillation of a classifier. The student learns labels and teacher outputs."""

    objective: Literal["task"]
    text_columns: Names | None = Field(None, max_length=2, description="One or two columns. Unset: detected.")
    label_column: str = Field("label", description="Column of the class (number, string or ClassLabel).")
    labels: Annotated[list[str] | None, _Once] = Field(None, min_length=2, description="Class names in order. Unset: detected.")
    metric_for_best: Literal["accuracy", "macro_f1", "loss"] = Field("accuracy", description=_BEST)
    temperature: float = Field(2.0, gt=0, description="Divisor of the logits of student and teacher.")
    alpha: Share = Field(0.5, description="Weight of the teacher's loss. The label loss weighs 1 - alpha.")


class DistillPretrainingStage(DistillStage, MaskedWordArguments):
    """Configure distillation of a language model with the three losses of DistilBERT."""

    objective: Literal["pretraining"]
    text_columns: list[str] | None = Field(
        None, min_length=1, max_length=1, description="Text column. Unset: text, or the only string column."
    )
    metric_for_best: Literal["loss", "perplexity", "masked_accuracy"] = Field("loss", description=_BEST)
    temperature: float = Field(2.0, gt=0, description="Divisor of the logits of student and teacher.")
    kl_weight: float = Field(5.0, ge=0, description="Weight of the KL divergence from the teacher.")
    mlm_weight: float = Field(2.0, ge=0, description="Weight of the masked language modelling loss.")
    cosine_weight: float = Field(1.0, ge=0, description="Weight of the cosine loss of last hidden states.")

    @property
    def text_column(self) -> str | None:
        """Return the name of the text column, or None to detect the column."""
        return self.text_columns[0] if self.text_columns else None


class DistillEmbeddingStage(DistillStage):
    """Configure distillation of embeddings. The student learns from unlabelled texts."""

    objective: Literal["embedding"]
    text_columns: Names | None = Field(None, description="Columns to read. Unset: all string columns.")
    sample_by: SampleBy = "paragraph"
    split_lines: bool = Field(False, description="Treat each line as a separate text.")
    max_length: Positive | None = Field(None, description="Maximum length in tokens. Unset: the teacher's.")
    metric_for_best: str = Field(
        "score",
        description=_BEST + " score: mean over eval_data of spearman (similarity) or ndcg@10 (retrieval).",
    )
    vector_loss: Literal["cosine", "mse"] = Field("cosine", description="Cosine or squared distance.")
    vector_weight: float = Field(1.0, ge=0, description="Weight of vector_loss.")
    similarity_weight: float = Field(1.0, ge=0, description="Weight of the squared error of similarities.")
    hidden_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared error of hidden states. Student and teacher then need equal "
        "tokenizers, and the teacher runs at every step.",
    )
    matryoshka_dims: list[Positive] | None = Field(None, min_length=1, description="Prefix lengths to train.")
    pooling: Literal["cls", "mean"] | None = Field(None, description="Pooling method. Unset: the teacher's.")
    normalize: bool | None = Field(None, description="Scale vectors to length 1. Unset: as the teacher.")
    keep_projection: bool = Field(
        False, description="End the student in the map to the teacher's vector size, so that its vectors are the teacher's."
    )
    student_vocab_size: Positive | None = Field(
        None,
        description="Keep this many tokens of the teacher's WordPiece tokenizer, the most frequent in data, and "
        "positions up to max_length. Unset: all.",
    )

    @model_validator(mode="after")
    def _student_fits_together(self) -> "DistillEmbeddingStage":
        if self.keep_projection and not self.vector_weight:
            raise ValueError("keep_projection keeps what vector_weight trains; increase vector_weight, or remove one field.")
        if self.student_vocab_size and (self.tokenizer or not self.student_layers):
            raise ValueError("student_vocab_size keeps tokens of the teacher; set student_layers, and remove tokenizer.")
        return self


class EvaluateStage(ModelStage):
    """Configure an evaluation. The columns of each data set decide which task is measured."""

    kind: Literal["evaluate"]
    data: DataSources = Field(description="Data sets for the evaluation.")
    task: Literal["retrieval", "triplets", "similarity", "classification", "clustering"] | None = Field(
        None, description="Unset: the head of the model and the columns decide."
    )
    baselines: bool = Field(True, description="For retrieval, also measure BM25 and an untrained model.")
    limit: Positive | None = Field(None, description="Use at most this many rows of each data set.")
    batch_size: Positive = Field(64, description="Texts per batch.")


# Models by kind of stage. The models of ``distill`` are listed by objective.
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
    """Represent a recipe: a name and a list of stages that run in order."""

    name: str = Field(pattern=r"^[\w.-]+$", description="Name of the recipe and of its folder in runs/.")
    seed: int = Field(42, ge=0, description="Seed of all stages that set no seed.")
    output_dir: str | None = Field(None, min_length=1, description="Folder of the run. Unset: runs/<name>.")
    stages: list[AnyStage] = Field(min_length=1, description="Stages in the order in which they run.")

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "Recipe":
        problems: list[str] = []
        names: set[str] = set()
        has_tokenizer = has_model = False
        for number, stage in enumerate(self.stages, start=1):
            where = f"Stage {number} ({stage.name})"
            if stage.name in names:
                problems.append(f"{where} has the same name as an earlier stage; set name: to another name.")
            names.add(stage.name)
            if isinstance(stage, TokenizerStage):
                has_tokenizer = True
                continue
            taught = isinstance(stage, DistillStage)  # can use the teacher's layers and tokenizer
            if stage.model is None and not has_model and not (taught and stage.student_layers):
                layers = " or student_layers: 3" if taught else ""
                problems.append(f"{where} has no model; give model: {{preset: search-8x768}}, a folder or a Hub id{layers}.")
            if isinstance(stage.model, NewModel) and not has_tokenizer and stage.tokenizer is None and not taught:
                problems.append(f"{where} has new weights but no tokenizer; add a tokenizer stage, or set tokenizer:.")
            has_model = has_model or not isinstance(stage, EvaluateStage)
        if problems:
            raise ValueError(" ".join(problems))
        return self
