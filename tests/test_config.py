"""Sizes of a model: what fits together, what is derived, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tap_deploy.config import VARIANTS, TapConfig
from tap_deploy.errors import InputError

FIELDS = [field.name for field in dataclasses.fields(TapConfig)]
# Millions of parameters, from the table of the model: image encoder, prompt encoder and image
# decoder, text decoder.
PUBLISHED_MILLIONS = {
    "tap_vit_b": (97.4, 6.4, 70.7),
    "tap_vit_l": (322.2, 6.4, 70.7),
    "tap_vit_h": (658.6, 6.4, 70.7),
}
PUBLISHED_ENCODERS = {
    "tap_vit_b": (12, 768, 12),
    "tap_vit_l": (24, 1024, 16),
    "tap_vit_h": (32, 1280, 16),
}


def problem_of(values):
    with pytest.raises(InputError) as caught:
        TapConfig.from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(**fields):
    return {**TapConfig().to_dict(), **fields}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [0, -16, 16.0, "16", None, True, False, [16], float("nan")])
def test_what_is_no_positive_integer_is_refused(field, value):
    message = problem_of(changed(**{field: value}))
    assert message == f"config field {field} is {value!r}; expected a positive integer"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 1000}, "image_size is 1000; expected a multiple of patch_size (16)"),
        ({"patch_size": 15}, "image_size is 1024; expected a multiple of patch_size (15)"),
        ({"window_size": 10}, "the token grid is 64; expected a multiple of window_size (10)"),
        ({"window_size": 128}, "the token grid is 64; expected a multiple of window_size (128)"),
        ({"encoder_depth": 10}, "encoder_depth is 10; expected a multiple of 4"),
        ({"encoder_dim": 770}, "encoder_dim is 770; expected a multiple of encoder_heads (12)"),
        ({"encoder_heads": 7}, "encoder_dim is 768; expected a multiple of encoder_heads (7)"),
        ({"encoder_dim": 765, "encoder_heads": 15}, "encoder_dim is 765; expected a multiple of 2"),
        ({"image_embed_dim": 250}, "image_embed_dim is 250; expected a multiple of 32"),
        ({"text_dim": 500}, "text_dim is 500; expected a multiple of 64"),
    ],
)
def test_what_does_not_divide_is_refused(fields, message):
    assert problem_of(changed(**fields)) == f"config: {message}"


@pytest.mark.parametrize(
    ("field", "smallest"), [("num_mask_tokens", 2), ("text_seq_len", 3), ("vocab_size", 4)]
)
def test_smallest_sizes(field, smallest):
    message = problem_of(changed(**{field: smallest - 1}))
    assert f"config field {field} is {smallest - 1}; expected at least {smallest}" in message
    assert getattr(TapConfig.from_dict(changed(**{field: smallest})), field) == smallest


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(field):
    values = changed()
    del values[field]
    assert f"unknown none, missing ['{field}']; expected exactly" in problem_of(values)


def test_unknown_fields_are_named():
    message = problem_of(changed(depth=12, Image_size=1024))
    assert "unknown ['Image_size', 'depth'], missing none" in message


@pytest.mark.parametrize("values", [None, [], "tap_vit_b", 3])
def test_what_is_no_object_is_refused(values):
    assert f"config is a {type(values).__name__}; expected a JSON object" in problem_of(values)


def test_a_config_survives_json(micro_config):
    for config in (micro_config, *VARIANTS.values()):
        assert TapConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert list(micro_config.to_dict()) == FIELDS


def test_a_config_cannot_be_changed_and_takes_names_only(micro_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        micro_config.image_size = 2048
    with pytest.raises(TypeError):
        TapConfig(1024)


@pytest.mark.parametrize("name", PUBLISHED_ENCODERS)
def test_published_variants(name):
    config = TapConfig.from_name(name)
    depth, dim, heads = PUBLISHED_ENCODERS[name]
    assert (config.encoder_depth, config.encoder_dim, config.encoder_heads) == (depth, dim, heads)
    assert config == dataclasses.replace(
        TapConfig(), encoder_depth=depth, encoder_dim=dim, encoder_heads=heads
    )
    assert (config.image_size, config.patch_size, config.window_size) == (1024, 16, 16)
    assert config.grid_size == 64
    assert config.low_res_mask_size == 256
    assert config.prompt_decoder_heads == 8
    assert config.text_heads == 8
    assert config.max_new_tokens == 38
    assert config.pad_id == 31999


def test_derived_values_of_another_model(micro_config):
    config = dataclasses.replace(
        micro_config, image_size=96, patch_size=8, window_size=4, text_seq_len=7, vocab_size=50
    )
    config = dataclasses.replace(config, image_embed_dim=96, text_dim=192)
    assert (config.grid_size, config.low_res_mask_size) == (12, 48)
    assert (config.prompt_decoder_heads, config.text_heads) == (3, 3)
    assert (config.max_new_tokens, config.pad_id) == (5, 49)


@pytest.mark.parametrize("name", ["tap_vit_x", "", "TAP_VIT_B", "tap_vit_b_v1_1"])
def test_an_unknown_variant_is_refused_with_the_known_ones(name):
    expected = f"unknown model {name!r}; expected one of {', '.join(VARIANTS)}"
    with pytest.raises(InputError) as caught:
        TapConfig.from_name(name)
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_the_parts_have_as_many_parameters_as_published(name):
    pytest.importorskip("torch")
    from tap_deploy.reference.state import meta_model

    model = meta_model(TapConfig.from_name(name))
    parts = (
        [model.image_encoder],
        [model.prompt_encoder, model.image_decoder],
        [model.text_decoder],
    )
    millions = tuple(
        round(sum(p.numel() for part in group for p in part.parameters()) / 1e6, 1)
        for group in parts
    )
    assert millions == PUBLISHED_MILLIONS[name]
