import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from minibert import MiniBertConfig
from minibert.configuration_minibert import AUTO_MAP, FIELDS, PRESETS


def test_search_preset_is_the_plain_default():
    assert MiniBertConfig.preset("search-8x768").to_dict() == MiniBertConfig().to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_name_of_a_preset_states_its_shape(name):
    config = MiniBertConfig.preset(name)
    if "x" in name:
        layers, width = (int(number) for number in name.split("-")[1].split("x"))
        assert (config.num_hidden_layers, config.hidden_size) == (layers, width)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name, tmp_path):
    config = MiniBertConfig.preset(name)
    config.save_pretrained(tmp_path)
    assert MiniBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP


def test_every_field_is_documented():
    documented = MiniBertConfig.__doc__
    assert [name for name in FIELDS if name not in documented] == []


def test_all_contradictions_are_reported_at_once():
    with pytest.raises(ValueError) as caught:
        MiniBertConfig(hidden_size=100, hidden_act="swoosh", pad_token_id=30000, hidden_dropout_prob=1.5)
    for part in ("multiple of the number of heads", "swoosh", "pad_token_id=30000", "hidden_dropout_prob=1.5"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"type_vocab_size": -1}, "type_vocab_size=-1 must not be negative"),
        ({"hidden_size": 12, "num_attention_heads": 4, "position_embedding_type": "rotary"}, "odd width"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        MiniBertConfig(**fields)


@pytest.mark.parametrize("fields", [{"hidden_size": "wide"}, {"pooling": "max"}, {"norm_position": "both"}])
def test_wrong_types_are_refused(fields):
    with pytest.raises(StrictDataclassFieldValidationError):
        MiniBertConfig(**fields)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'bert-huge'; use one of search-8x768, nano-1x3"):
        MiniBertConfig.preset("bert-huge")


def test_unknown_override_is_refused():
    with pytest.raises(ValueError, match="no field 'hidden'; its fields are .*hidden_size"):
        MiniBertConfig.preset("bert-base", hidden=3)


def test_labels_may_be_overridden():
    assert MiniBertConfig.preset("nano-1x3", num_labels=5).num_labels == 5
