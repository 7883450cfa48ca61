"""Define the MiniBERT encoder and its task heads.

This file is saved with every checkpoint. ``packing_minibert.py`` skips padding tokens.
``kernels_minibert.py`` and ``loss_minibert.py`` contain functions that save time or memory.

Letters in shapes: B batch, L padded length, T real tokens of a batch, C hidden width, H heads,
D head width, V vocabulary. (…, C) means (B, L, C) with padding or (T, C) without padding.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_minibert import MiniBertConfig
from .kernels_minibert import (
    MiniBertDropout,
    add,
    at_least_float32,
    eager_attention_forward,
    is_hooked,
    is_transformed,
    linear,
    to_compute_dtype,
)
from .loss_minibert import masked_lm_loss
from .packing_minibert import Packing, pack_batch, packed_forward

# transformers does not set a loaded module as an attribute of its package. dill, which computes
# the cache keys of Dataset.map, needs the attribute to find the classes.
setattr(import_module(__package__), "modeling_minibert", import_module(__name__))  # noqa: B010
logger = logging.get_logger(__name__)

# ------------------------------------------------------------------- positions


def sinusoidal_table(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the sinusoidal position embeddings (length, width) of Vaswani et al. 2017."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    frequencies = torch.exp(exponents * (-math.log(10000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * frequencies  # (length, ceil(width / 2))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines (…, 1, D) of the rotary angles of positions (…)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * theta**-exponents  # (…, D / 2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``states`` (…, H, D) by the angles with cosines ``cos`` and sines ``sin``."""
    exact = at_least_float32(states)
    first, second = exact.chunk(2, dim=-1)
    rotated = exact * cos + torch.cat([-second, first], dim=-1) * sin
    return rotated.to(states.dtype)


# ---------------------------------------------------------------------- blocks


class MiniBertLayerNorm(nn.LayerNorm):
    """Compute layer norm in float32, even if the parameters have half precision."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.layer_norm(
            at_least_float32(hidden_states),
            self.normalized_shape,
            at_least_float32(self.weight),
            at_least_float32(self.bias),
            self.eps,
        )


class MiniBertEmbeddings(nn.Module):
    """Compute the sum of word, position and segment embeddings in float32."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        if config.type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        normed = config.norm_position == "post" or config.norm_embeddings
        self.norm = MiniBertLayerNorm(width, eps=config.layer_norm_eps) if normed else nn.Identity()
        self.dropout = MiniBertDropout(config.hidden_dropout_prob)
        self.position_embedding_type = config.position_embedding_type
        self.max_positions = config.max_position_embeddings
        self.scale = math.sqrt(width) if config.scale_embeddings else None

    def forward(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Return embeddings (…, C). If ``inputs_embeds`` is given, ``input_ids`` is ignored."""
        states = at_least_float32(self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        if self.scale is not None:
            states = states * self.scale
        if hasattr(self, "token_type_embeddings"):
            if token_type_ids is None:  # packed: segment 0 for all tokens
                token_type_ids = position_ids.new_zeros(1)
            states = states + self.token_type_embeddings(token_type_ids)
        if self.position_embedding_type == "learned":
            states = states + self.position_embeddings(position_ids)
        elif self.position_embedding_type == "sinusoidal":
            # A stored table would lose digits when the model is cast to half precision.
            table = sinusoidal_table(self.max_positions, states.shape[-1], states.device)
            states = states + F.embedding(position_ids, table)
        return self.dropout(self.norm(states))


class MiniBertAttention(nn.Module):
    """Compute multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: MiniBertConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = MiniBertDropout(config.attention_probs_dropout_prob)
        self.is_causal = False  # read by transformers' attention functions
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packing: Packing | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        inputs = to_compute_dtype(hidden_states, self.query)  # cast once for all three
        query, key, value = (linear(x, inputs).view(shape) for x in (self.query, self.key, self.value))  # (…, H, D)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        dropout = self.dropout.p if self.dropout.training else 0.0
        implementation = self.config._attn_implementation
        if packing is not None and implementation == "sdpa":
            context, weights = packing.attend(query, key, value, dropout, self.scaling), None
        else:
            if packing is not None:  # all sequences in one row, for transformers' variable-length kernels
                query, key, value, kwargs = query[None], key[None], value[None], kwargs | packing.kernel_arguments()
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, L, D)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)  # prepends the prefix
            function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            context, weights = function(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return linear(self.output, context.reshape(hidden_states.shape)), weights


class MiniBertMLP(nn.Module):
    """Compute the MLP of a layer, with or without a gate (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size) if config.gated_mlp else None
        self.act = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inputs = to_compute_dtype(hidden_states, self.up)
        if self.gate is None:
            return linear(self.down, linear(self.up, inputs, self.act))
        return linear(self.down, linear(self.gate, inputs, self.act) * linear(self.up, inputs))


class MiniBertLayer(GradientCheckpointingLayer):
    """Compute a layer: attention and MLP, each with a norm and a residual connection."""

    def __init__(self, config: MiniBertConfig, layer_idx: int):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.attention = MiniBertAttention(config, layer_idx)
        self.attention_norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MiniBertMLP(config)
        self.mlp_norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = MiniBertDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.norm_first:
            update, _ = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
            hidden_states = add(hidden_states, self.dropout(update))
            return add(hidden_states, self.dropout(self.mlp(self.mlp_norm(hidden_states))))
        update, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = self.attention_norm(add(hidden_states, self.dropout(update)))
        return self.mlp_norm(add(hidden_states, self.dropout(self.mlp(hidden_states))))


class MiniBertPooler(nn.Module):
    """Compute a vector per text (B, C): pooling, then a dense layer and an activation."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.pooling = config.pooling
        self.act = ACT2FN[config.pooler_act]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            pooled = hidden_states[:, 0] if self.pooling == "cls" else hidden_states.mean(dim=1)
        elif self.pooling == "cls":
            first = (attention_mask != 0).long().argmax(dim=1)  # not always 0, since padding may be on the left
            pooled = hidden_states[torch.arange(first.shape[0], device=first.device), first]
        else:
            mask = (attention_mask != 0).to(hidden_states.dtype).unsqueeze(-1)  # (B, L, 1)
            pooled = (hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        return at_least_float32(linear(self.dense, pooled, self.act))


# ----------------------------------------------------------------------- model


class MiniBertPreTrainedModel(PreTrainedModel):
    """Provide loading, initialisation and feature flags for all MiniBERT classes."""

    config_class = MiniBertConfig
    base_model_prefix = "minibert"
    # Save the code files with the model, so that it loads with trust_remote_code=True where the
    # package is not installed.
    _auto_class = "AutoModel"
    _input_embed_layer = "word_embeddings"  # where transformers finds and replaces the embeddings
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniBertEmbeddings", "MiniBertLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MiniBertLayer, "attentions": MiniBertAttention}

    def run_encoder(self, labels: Tensor | None, *given: Tensor | None, **kwargs: Any) -> Any:
        """Call the encoder. If padding tokens have labels, warn and encode all tokens."""
        mask: Any = given[1]
        traced = torch.compiler.is_compiling() or (labels is not None and is_transformed(labels))
        comparable = labels is not None and mask is not None and mask.shape == labels.shape and not traced
        if comparable and bool(((labels != -100) & (mask == 0)).any()):
            logger.warning_once("Padding tokens have labels, which count in the loss; use -100 to ignore them.")
            kwargs["unpad_inputs"] = False
        encoder: Any = self.minibert
        return encoder(*given, return_dict=True, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # Linear, Embedding and LayerNorm
        if isinstance(module, MiniBertLMHead):
            init.zeros_(module.bias)


class MiniBertModel(MiniBertPreTrainedModel):
    """Encode token ids into one contextual vector per token and one pooled vector per text."""

    def __init__(self, config: MiniBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = MiniBertEmbeddings(config)
        self.layers = nn.ModuleList([MiniBertLayer(config, at) for at in range(config.num_hidden_layers)])
        norm_last = config.norm_position == "pre"
        self.final_norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps) if norm_last else nn.Identity()
        self.pooler = MiniBertPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        unpad_inputs: bool = True,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch.

        Args:
            input_ids: (B, L) token ids. None if ``inputs_embeds`` is given.
            attention_mask: (B, L), 1 for real tokens, 0 for padding. The default is 1. A mask
                (B, 1, L, L) is passed to the attention function unchanged.
            token_type_ids: (B, L) segments. The default is 0.
            position_ids: (B, L) or (1, L). The default is 0 … L - 1.
            inputs_embeds: (B, L, C) word embeddings instead of ``input_ids``.
            cu_seq_lens_q: (sequences + 1,) bounds of the sequences in one row (B = 1).
            max_length_q: length of the longest sequence, if ``cu_seq_lens_q`` is given.
            unpad_inputs: if False, compute padding tokens too.
            **kwargs: passed on to the attention function, such as ``output_attentions``.
            past_key_values: keys and values of P prefix tokens. The mask is then (B, P + L).

        Returns:
            ``last_hidden_state`` (B, L, C), in float32 even for half-precision weights, and
            ``pooler_output`` (B, C). Rows of padding tokens have no meaning.

        Raises:
            ValueError: if ids and embeddings are both given or missing, a text is too long, or
                an id is not in the vocabulary. Ids are checked on the CPU only.
        """
        prefix = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = self._check_inputs(input_ids, attention_mask, position_ids, inputs_embeds, prefix)
        if position_ids is None:
            position_ids = torch.arange(prefix, prefix + inputs.shape[1], device=inputs.device).unsqueeze(0)
        packable = unpad_inputs and past_key_values is None
        packing = pack_batch(self, inputs, attention_mask, cu_seq_lens_q, max_length_q, kwargs) if packable else None
        if packing is None and token_type_ids is None:
            token_type_ids = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        given = (input_ids, token_type_ids, position_ids, inputs_embeds)
        if packing is None:
            mask = self._padded_mask(inputs, attention_mask, cu_seq_lens_q, past_key_values)
            hidden_states = self.encode_tokens(*given, mask, past_key_values=past_key_values, **kwargs)  # (B, L, C)
        else:
            hidden_states = packed_forward(self, packing, given, *inputs.shape[:2], **kwargs)
        real = attention_mask[:, prefix:] if attention_mask is not None and attention_mask.dim() == 2 else None
        pooled = self.pooler(hidden_states, real) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def encode_tokens(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the embeddings and all layers: ids (…) -> hidden states (…, C)."""
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        rotary = None
        if self.config.position_embedding_type == "rotary":
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            rotary = rotary_angles(position_ids, head_dim, self.config.rope_theta)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, rotary=rotary, **kwargs)
        return self.final_norm(hidden_states)

    def forward_packed(self, input_ids: Tensor, position_ids: Tensor, packing: Packing) -> Tensor:
        """Encode concatenated sequences: ids and positions (T,) -> hidden states (T, C).

        Raises:
            ValueError: if an id is not in the vocabulary. Ids are checked on the CPU only.
        """
        given = (input_ids[None], None, position_ids[None], None)
        self._check_inputs(given[0], None, given[2], None)
        return packed_forward(self, packing, given, 1, len(input_ids))[0]

    def _padded_mask(
        self, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, past_key_values: Cache | None
    ) -> Any:
        """Return the attention mask in the format that the attention function needs."""
        only_same_document = None
        if cu_seqlens is not None:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            document = torch.bucketize(positions, cu_seqlens[1:].to(positions.dtype), right=True)

            def only_same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return document[query] == document[key]

        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states.new_empty((*hidden_states.shape[:2], 1), dtype=torch.float32),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=only_same_document,
        )

    def _check_inputs(
        self, input_ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, embeds: Tensor | None, prefix: int = 0
    ) -> Tensor:
        """Return the given ids or embeddings. Raise ValueError if inputs are invalid."""
        inputs = input_ids if embeds is None else embeds
        if inputs is None or (input_ids is not None and embeds is not None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        expected = (inputs.shape[0], prefix + inputs.shape[1])
        if mask is not None and mask.dim() < 4 and mask.shape != expected:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} but the input has {expected} (batch, tokens); "
                "give 1 or 0 for every token."
            )
        limit, table = self.config.max_position_embeddings, self.config.position_embedding_type != "rotary"
        if table and positions is None and expected[1] > limit:
            raise ValueError(
                f"The input has {expected[1]} tokens but this model has max_position_embeddings={limit}; "
                f"tokenize with truncation=True, max_length={limit}, or train a model with more positions."
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(inputs):
            return inputs
        size = getattr(self.embeddings.word_embeddings, "num_embeddings", None)  # None for a replaced module
        if size is not None and input_ids is not None and input_ids.device.type == "cpu" and input_ids.numel():
            low, high = (int(x) for x in torch.aminmax(input_ids))
            if low < 0 or high >= size:
                raise ValueError(
                    f"Token id {low if low < 0 else high} is not in the model's vocabulary of {size} entries; "
                    "use the tokenizer this model was trained with, or call resize_token_embeddings."
                )
        return inputs


# ----------------------------------------------------------------------- heads


class MiniBertLMHead(nn.Module):
    """Predict words: hidden states (…, C) -> logits (…, V)."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden_states: Tensor) -> Tensor:
        """Apply the layers before the decoder: (…, C) -> (…, C)."""
        return self.norm(linear(self.dense, hidden_states, self.act))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return at_least_float32(linear(self.decoder, self.transform(hidden_states)))


class MiniBertMaskedLMBase(MiniBertPreTrainedModel):
    """Provide the word-prediction head for masked language modeling and pretraining."""

    _tied_weights_keys = {
        "lm_head.decoder.weight": "minibert.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    def predict_words(
        self, hidden_states: Tensor, labels: Tensor | None, return_logits: bool, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return loss and logits. Without ``return_logits``, skip tokens with label -100."""
        if labels is not None and not return_logits:
            labelled = labels.flatten() != -100
            hidden_states, labels = hidden_states.flatten(0, 1)[labelled], labels.flatten()[labelled]
            decoder, traced = self.lm_head.decoder, torch.compiler.is_compiling() or is_transformed(hidden_states)
            plain = type(decoder) is nn.Linear and not is_hooked(decoder)
            if plain and not traced and self.loss_function is LOSS_MAPPING["ForMaskedLM"]:
                count = kwargs.get("num_items_in_batch", max(1, len(labels)))
                return masked_lm_loss(self.lm_head.transform, decoder, hidden_states, labels) / count, None
        logits = self.lm_head(hidden_states)
        if labels is None:
            return None, logits
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs), logits


class MiniBertForMaskedLM(MiniBertMaskedLMBase):
    """Predict masked words (Devlin et al. 2018, arXiv:1810.04805)."""

    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config)
        self.minibert = MiniBertModel(config, add_pooling_layer=False)
        self.lm_head = MiniBertLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Return word logits (B, L, V). ``labels`` (B, L) are -100 for unmasked tokens.

        With labels and ``return_logits=False``, tokens with label -100 are skipped.
        """
        outputs = self.run_encoder(labels, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        loss, logits = self.predict_words(outputs.last_hidden_state, labels, return_logits, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


@dataclass
class MiniBertForPreTrainingOutput(ModelOutput):
    """Store the loss and the logits of the two pretraining tasks."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MiniBertForPreTraining(MiniBertMaskedLMBase):
    """Predict masked words, and whether the second segment follows the first segment."""

    _auto_class = "AutoModelForPreTraining"
    accepts_loss_kwargs = False  # the loss is a mean, so Trainer must divide it by the accumulation steps

    def __init__(self, config: MiniBertConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # transformers cannot derive the loss from this class name
        self.minibert = MiniBertModel(config)
        self.lm_head = MiniBertLMHead(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> MiniBertForPreTrainingOutput:
        """Return logits of both tasks. The loss is the sum over the tasks with given labels.

        ``labels`` are as in :class:`MiniBertForMaskedLM`. ``next_sentence_label`` (B,) is 0 if
        the second segment follows the first segment, and 1 otherwise.
        """
        outputs = self.run_encoder(labels, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        loss, logits = self.predict_words(outputs.last_hidden_state, labels, return_logits)
        follows = at_least_float32(linear(self.next_sentence, outputs.pooler_output))  # (B, 2)
        if next_sentence_label is not None:
            next_loss = F.cross_entropy(follows, next_sentence_label.view(-1))
            loss = next_loss if loss is None else loss + next_loss
        return MiniBertForPreTrainingOutput(loss, logits, follows, outputs.hidden_states, outputs.attentions)


class MiniBertClassifierBase(MiniBertPreTrainedModel):
    """Provide dropout and one linear layer on top of the encoder for classification heads."""

    def __init__(self, config: MiniBertConfig, outputs: int | None, add_pooling_layer: bool):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.minibert = MiniBertModel(config, add_pooling_layer=add_pooling_layer)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = MiniBertDropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, outputs or 0)
        self.post_init()

    def classify(self, states: Tensor) -> Tensor:
        return at_least_float32(linear(self.classifier, self.dropout(states)))


class MiniBertForSequenceClassification(MiniBertClassifierBase):
    """Predict a label, several labels or a number per text. ``config.problem_type`` decides."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits (B, num_labels). ``labels``: (B,), or (B, num_labels) if multilabel."""
        outputs = self.run_encoder(None, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classify(outputs.pooler_output)
        arguments: dict[str, Any] = {"labels": labels, "pooled_logits": logits, "config": self.config}
        loss = None if labels is None else self.loss_function(**arguments, **kwargs)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class MiniBertForTokenClassification(MiniBertClassifierBase):
    """Predict a label for every token, for example a named entity."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Return logits (B, L, num_labels). ``labels`` (B, L) are -100 for ignored tokens."""
        outputs = self.run_encoder(labels, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classify(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class MiniBertForQuestionAnswering(MiniBertPreTrainedModel):
    """Predict the span of the context that answers a question (Devlin et al. 2018)."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config)
        self.minibert = MiniBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Return start and end logits (B, L), and the loss if the answers' positions are given.

        Padding tokens get the lowest possible logit, so that padding does not change the loss.
        """
        labels, real = None, attention_mask.bool() if attention_mask is not None and attention_mask.dim() == 2 else None
        if real is not None and start_positions is not None and end_positions is not None:
            ends = torch.stack([start_positions.view(-1), end_positions.view(-1)], dim=1).clamp(0, real.shape[1] - 1)  # (B, 2)
            labels = torch.full_like(real, -100, dtype=torch.long).scatter(1, ends, 1)
            real = real.scatter(1, ends, True)  # a label at padding must keep a finite loss
        outputs = self.run_encoder(labels, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = at_least_float32(linear(self.qa_outputs, outputs.last_hidden_state))  # (B, L, 2)
        if real is not None:
            logits = logits.masked_fill(~real.unsqueeze(-1), torch.finfo(logits.dtype).min)
        start_logits, end_logits = (x.contiguous() for x in logits.unbind(dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


class MiniBertForMultipleChoice(MiniBertClassifierBase):
    """Score the choices for a question. Each choice is encoded together with the question."""

    _auto_class = "AutoModelForMultipleChoice"
    accepts_loss_kwargs = False  # the loss is a mean, so Trainer must divide it by the accumulation steps

    def __init__(self, config: MiniBertConfig):
        super().__init__(config, 1, add_pooling_layer=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Return logits (B, choices) for inputs (B, choices, L) and ``labels`` (B,)."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.minibert(*(None if x is None else x.flatten(0, 1) for x in given), return_dict=True, **kwargs)
        choices = next(x.shape[1] for x in (input_ids, inputs_embeds) if x is not None)
        logits = self.classify(outputs.pooler_output).view(-1, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)
