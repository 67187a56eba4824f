"""Checkpoints of every format, whole, broken, foreign and hostile."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import stat
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from tap_deploy.config import DEMO, VARIANTS, TapConfig
from tap_deploy.errors import (
    CheckpointError,
    InputError,
    MissingDependencyError,
    UnsafeCheckpointError,
)
from tap_deploy.reference import checkpoint as checkpoint_module
from tap_deploy.reference import synthetic as synthetic_module
from tap_deploy.reference.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from tap_deploy.reference.image_encoder import relative_index
from tap_deploy.reference.state import meta_model
from tap_deploy.reference.synthetic import synthetic_array, synthetic_model, synthetic_state_dict
from tap_deploy.reference.weight_names import find_weights

DATA = Path(__file__).parent / "data"
SUFFIXES = (".pkl", ".pth", ".pt", ".safetensors")
INDEX = "image_encoder.blocks.2.attn.rel_pos_embed.index"
PUBLISHED = [name for name in VARIANTS if name != DEMO]
COUNTER = "image_encoder.neck.output_conv.0.1.num_batches_tracked"
WEIGHT = "image_encoder.blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def spec() -> dict:
    return json.loads((DATA / "tap_micro.json").read_text())


@pytest.fixture(scope="module")
def config(spec) -> TapConfig:
    return TapConfig.from_dict(spec["config"])


@pytest.fixture(scope="module")
def micro_weights(config) -> dict[str, np.ndarray]:
    return synthetic_state_dict(config)


@pytest.fixture
def weights(micro_weights) -> dict[str, np.ndarray]:
    """The entries may be replaced, but not written to."""
    return dict(micro_weights)


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1500
    return message


def load_error(path: Path, config: TapConfig, kind: type = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        load_checkpoint(path, config)
    return message_of(error)


def assert_model_holds(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    state = model.state_dict()
    assert set(state) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), value, err_msg=name)


# Synthetic weights


def test_synthetic_weights_have_the_names_shapes_and_dtypes_of_the_manifest(spec, micro_weights):
    found = {name: [list(a.shape), a.dtype.name] for name, a in micro_weights.items()}
    assert found == spec["state_dict"]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_model_has_the_entries_of_the_official_checkpoints(variant):
    manifest = json.loads((DATA / f"state_dict.{variant}.json").read_text())
    state = meta_model(VARIANTS[variant]).state_dict()
    found = {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in state.items()}
    assert found == manifest


def expected_draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        (WEIGHT, lambda x: x / np.sqrt(64)),
        ("image_encoder.patch_embed.proj.weight", lambda x: x / np.sqrt(3 * 16 * 16)),
        ("image_encoder.blocks.1.norm1.weight", lambda x: 1 + 0.1 * x),
        ("image_encoder.blocks.1.norm1.bias", lambda x: 0.05 * x),
        ("image_encoder.pos_embed.weight", lambda x: 0.2 * x),
        ("image_encoder.blocks.3.attn.rel_pos_embed.weight", lambda x: 0.5 * x),
        ("image_encoder.cross_conv.0.norm1.running_mean", lambda x: 0.1 * x),
        ("prompt_encoder.coord_matrix", lambda x: x),
        ("prompt_encoder.point_embed.weight", lambda x: 0.5 * x),
        ("image_decoder.sem_tokens.weight", lambda x: 0.5 * x),
        ("image_decoder.iou_token.weight", lambda x: 0.5 * x),
        ("text_decoder.transformer.tok_embeddings.weight", lambda x: 0.5 * x),
        ("text_decoder.transformer.text_proj.weight", lambda x: x / np.sqrt(128)),
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_synthetic_values_equal_the_published_recipe_bit_for_bit(config, name, formula, seed):
    found = synthetic_state_dict(config, seed)[name]
    expected = formula(expected_draw(name, found.shape, seed)).astype(np.float32)
    assert found.tobytes() == expected.tobytes()


def test_synthetic_constants_and_variances(micro_weights):
    mean = np.array([103.53, 116.28, 123.675], np.float32)
    np.testing.assert_array_equal(micro_weights["pixel_mean"], mean)
    rsig = (1 / np.array([57.375, 57.12, 58.395])).astype(np.float32)
    np.testing.assert_array_equal(micro_weights["pixel_rsig"], rsig)
    assert micro_weights[COUNTER] == 0
    name = "image_encoder.cross_conv.0.norm1.running_var"
    rng = np.random.default_rng([0, zlib.crc32(name.encode())])
    np.testing.assert_array_equal(micro_weights[name], rng.uniform(0.5, 1.5, 32).astype(np.float32))
    index = micro_weights[INDEX]
    for query, key in [(0, 0), (0, 255), (255, 0), (17, 2), (100, 37)]:
        (qy, qx), (ky, kx) = divmod(query, 16), divmod(key, 16)
        assert index[query, key] == (qy - ky + 15) * 31 + (qx - kx + 15)


def test_synthetic_values_do_not_depend_on_the_other_entries(micro_weights):
    alone = synthetic_array(WEIGHT, (192, 64), "float32")
    np.testing.assert_array_equal(alone, micro_weights[WEIGHT])
    half = synthetic_array(WEIGHT, (192, 64), "float16")
    assert half.dtype == np.float16


def test_synthetic_model_is_ready_for_inference(config, micro_weights):
    model = synthetic_model(config)
    assert_model_holds(model, micro_weights)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Round trips


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_and_storage_dtype_loads_as_float32(tmp_path, config, weights, suffix, dtype):
    path = tmp_path / f"micro{suffix}"
    stored = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in weights.items()}
    save_checkpoint(stored, path)
    model, checkpoint = load_checkpoint(path, config)
    expected = {n: a.astype("f4") if a.dtype.kind == "f" else a for n, a in stored.items()}
    assert_model_holds(model, expected)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    formats = {".pkl": "pickle", ".safetensors": "safetensors"}
    assert checkpoint.format == formats.get(suffix, "torch")
    data = path.read_bytes()
    assert checkpoint.sha256 == hashlib.sha256(data).hexdigest()
    assert checkpoint.md5 == hashlib.md5(data).hexdigest()
    assert checkpoint.known_as is None
    assert checkpoint.state_dict.keys() == weights.keys()
    assert checkpoint.state_dict[WEIGHT].data_ptr() == model.state_dict()[WEIGHT].data_ptr()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bfloat16_and_mixed_storage_load(tmp_path, config, weights, suffix):
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    tensors[WEIGHT] = tensors[WEIGHT].bfloat16()
    tensors["pixel_mean"] = tensors["pixel_mean"].double()
    save_checkpoint(tensors, tmp_path / f"micro{suffix}")
    model, _ = load_checkpoint(tmp_path / f"micro{suffix}", config)
    assert torch.equal(model.state_dict()[WEIGHT], tensors[WEIGHT].float())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_loaded_model_can_be_saved_and_loaded_again(tmp_path, config, weights, suffix):
    without = {n: a for n, a in weights.items() if not n.endswith("rel_pos_embed.index")}
    save_checkpoint(without, tmp_path / "first.pkl")
    model, _ = load_checkpoint(tmp_path / "first.pkl", config)
    save_checkpoint(model, tmp_path / f"second{suffix}")
    again, _ = load_checkpoint(tmp_path / f"second{suffix}", config)
    assert_model_holds(again, weights)


def test_a_saved_pkl_is_a_plain_dict_of_numpy_arrays(tmp_path, config):
    save_checkpoint(synthetic_model(config), tmp_path / "micro.pkl")
    content = pickle.loads((tmp_path / "micro.pkl").read_bytes())
    assert type(content) is dict
    assert all(type(value) is np.ndarray for value in content.values())


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_any_protocol_loads(tmp_path, config, weights, protocol):
    (tmp_path / "micro.pkl").write_bytes(pickle.dumps(OrderedDict(weights), protocol))
    model, _ = load_checkpoint(tmp_path / "micro.pkl", config)
    assert_model_holds(model, weights)


def test_big_endian_and_fortran_arrays_and_numpy_scalars_load(tmp_path, config, weights):
    stored = dict(weights)
    stored[WEIGHT] = np.asfortranarray(weights[WEIGHT]).astype(">f4")
    stored[COUNTER] = np.int64(7)
    (tmp_path / "micro.pkl").write_bytes(pickle.dumps(stored))
    model, _ = load_checkpoint(tmp_path / "micro.pkl", config)
    assert_model_holds(model, weights | {COUNTER: np.array(7)})
    assert model.state_dict()[WEIGHT].is_contiguous()


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in weights.items()}


def write(path: Path, content: dict) -> Path:
    """Write nested dicts of arrays in the format that the suffix names."""

    def tensors(value: object) -> object:
        if isinstance(value, dict):
            return {key: tensors(item) for key, item in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    elif path.suffix == ".pth":
        torch.save(tensors(content), path)
    else:
        safetensors_torch.save_file(tensors(content), path)
    return path


def load_removed(path: Path, config: TapConfig, weights: dict) -> tuple[str, ...]:
    model, checkpoint = load_checkpoint(path, config)
    assert_model_holds(model, weights)
    return checkpoint.removed


TRAINED = {"epoch": 3, "lr": [0.1], "optimizer": {"state": {0: {"step": np.zeros(())}}}}


@pytest.mark.parametrize(
    "keys", ["model", "state_dict", "model_state", "model_ema.module", "a.b.c"]
)
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_weights_are_found_in_dicts(tmp_path, config, weights, suffix, prefix, keys):
    content = prefixed(weights, prefix)
    for key in reversed(keys.split(".")):
        content = {key: content}
    path = write(tmp_path / f"micro{suffix}", content | TRAINED)
    assert load_removed(path, config, weights) == (f"{keys}.{prefix}",)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "ema_model.module.", "net."]
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_prefixes_of_training_programs_are_taken_off(tmp_path, config, weights, suffix, prefix):
    stored = prefixed(weights, prefix) | {"criterion.weight": np.ones(3)}
    path = write(tmp_path / f"micro{suffix}", stored)
    assert load_removed(path, config, weights) == (prefix,)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_parts_that_were_wrapped_alone_are_found(tmp_path, config, weights, prefix):
    parts = {"image_encoder.": "image_encoder._orig_mod.", "text_decoder.": "text_decoder.module."}
    stored = prefixed(weights, prefix)
    for part, wrapped in parts.items():
        stored = {name.replace(part, wrapped, 1): value for name, value in stored.items()}
    assert stored.keys() != prefixed(weights, prefix).keys()
    path = write(tmp_path / "micro.pth", stored)
    removed = load_removed(path, config, weights)
    assert set(removed) == {"_orig_mod.", "module."} | ({prefix} if prefix else set())


def test_whole_names_stay_as_they_are(tmp_path, config, weights):
    for variant in PUBLISHED:  # or a prefix could not be told from a name
        for name in json.loads((DATA / f"state_dict.{variant}.json").read_text()):
            assert not {"module", "_orig_mod"} & set(name.split("."))
    path = write(tmp_path / "micro.pth", weights)
    assert load_removed(path, config, weights) == ()
    # What begins with the same letters is no prefix.
    path = write(tmp_path / "micro.pth", prefixed(weights, "x_"))
    assert "unexpected (x_pixel_mean" in load_error(path, config)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda w: {"model": w, "model_ema": dict(w)}, "model.pixel_rsig, model_ema.pixel_rsig"),
        (lambda w: w | prefixed(w, "ema."), "pixel_rsig, ema.pixel_rsig"),
        (
            lambda w: {"state_dict": prefixed(w, "model.") | prefixed(w, "ema.module.")},
            "state_dict.model.pixel_rsig, state_dict.ema.module.pixel_rsig",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_one_of_several_models_is_not_guessed(tmp_path, config, weights, suffix, make, found):
    path = write(tmp_path / f"micro{suffix}", make(weights))
    message = load_error(path, config)
    assert f"contains 2 models ({found}); expected one; save the weights to use" in message


def test_an_average_of_the_parameters_alone_is_no_second_model(tmp_path, config, weights):
    average = {name: value for name, value in weights.items() if not name.startswith("pixel_")}
    path = write(tmp_path / "micro.pth", {"model": weights, "ema": average})
    assert load_removed(path, config, weights) == ("model.",)


def test_one_model_under_two_keys_is_one(tmp_path, config, weights):
    path = tmp_path / "micro.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "best": weights}))
    assert load_removed(path, config, weights) == ("model.",)


def test_a_name_with_and_without_a_wrapper_is_reported(tmp_path, config, weights):
    weights["module.pixel_mean"] = weights["pixel_mean"]
    message = save_and_fail(tmp_path, weights, config)
    assert "contains entry pixel_mean twice, the second time as module.pixel_mean" in message


def test_what_is_wrong_below_a_prefix_is_reported_with_it(tmp_path, config, weights):
    del weights["pixel_mean"]
    weights["extra"] = np.zeros(1)
    message = load_error(write(tmp_path / "micro.pth", {"model": weights}), config)
    assert "(names read without model.) does not fit the model" in message
    assert "1 missing (pixel_mean); 1 unexpected (extra)" in message
    # Without the entry that identifies a TAP model, names are not changed.
    stored = {name: value for name, value in weights.items() if not name.startswith("pixel_")}
    message = load_error(write(tmp_path / "micro.pth", prefixed(stored, "module.")), config)
    assert "unexpected (module.image_encoder." in message


def test_deep_and_circular_dicts_end(tmp_path):
    path = tmp_path / "micro.pkl"
    circular: dict = {"a": np.zeros(3)}
    circular["b"] = circular
    path.write_bytes(pickle.dumps({"model": circular}))
    with pytest.raises(
        CheckpointError, match=r"no entry pixel_rsig; found model\.a; check that it is"
    ):
        read_checkpoint(path)
    # Each layer names the next one ten times: 10 ** 5 ways to the bottom.
    layer: dict = {"a": np.zeros(3)}
    for _ in range(2000):
        layer = {str(i): layer for i in range(10)}
    with pytest.raises(CheckpointError, match="no entry pixel_rsig"):
        find_weights(layer, "it")


def test_an_old_torch_file_and_parameters_load(tmp_path, config, weights):
    module = synthetic_model(config).requires_grad_(True)
    state = OrderedDict(module.named_parameters()) | OrderedDict(module.named_buffers())
    path = tmp_path / "micro.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    model, checkpoint = load_checkpoint(path, config)
    assert checkpoint.format == "torch"
    assert_model_holds(model, weights)


@pytest.mark.parametrize("written", SUFFIXES)
@pytest.mark.parametrize("named", [".pkl", ".pth", ".safetensors", ".bin"])
def test_the_content_decides_where_the_suffix_lies(tmp_path, config, weights, written, named):
    save_checkpoint(weights, tmp_path / f"micro{written}")
    path = (tmp_path / f"micro{written}").rename(tmp_path / f"other{named}")
    assert_model_holds(load_checkpoint(path, config)[0], weights)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_derivable_entries_may_be_missing(tmp_path, config, weights, suffix):
    counted = weights | {COUNTER: np.array(12)}
    derivable = ("rel_pos_embed.index", "num_batches_tracked")
    bare = {n: a for n, a in weights.items() if not n.endswith(derivable)} | {COUNTER: np.array(12)}
    assert len(bare) < len(weights)
    save_checkpoint(bare, tmp_path / f"micro{suffix}")
    assert_model_holds(load_checkpoint(tmp_path / f"micro{suffix}", config)[0], counted)


def test_known_md5_prefixes_are_recognised(tmp_path, monkeypatch, weights):
    save_checkpoint(weights, tmp_path / "micro.pkl")
    md5 = read_checkpoint(tmp_path / "micro.pkl").md5
    monkeypatch.setitem(checkpoint_module.KNOWN_MD5_PREFIXES, md5[:6], "tap_vit_l_v1_1")
    assert read_checkpoint(tmp_path / "micro.pkl").known_as == "tap_vit_l_v1_1"


def test_read_checkpoint_keeps_the_stored_dtype_and_says_little_in_repr(tmp_path, weights):
    save_checkpoint({WEIGHT: weights[WEIGHT].astype("f2")}, tmp_path / "a.pkl")
    checkpoint = read_checkpoint(str(tmp_path / "a.pkl"))
    assert checkpoint.state_dict[WEIGHT].dtype == torch.float16
    assert "tensor(" not in repr(checkpoint)


# Checkpoints that do not fit


def save_and_fail(folder: Path, weights: dict, config: TapConfig) -> str:
    save_checkpoint(weights, folder / "micro.pkl")
    return load_error(folder / "micro.pkl", config)


def test_missing_entries_are_listed(tmp_path, config, weights):
    names = [name for name in weights if name.startswith("text_decoder")]
    for name in names:
        del weights[name]
    message = save_and_fail(tmp_path, weights, config)
    assert f"{len(names)} missing" in message
    assert all(name in message for name in names[:5])
    assert names[5] not in message
    assert "unexpected" not in message


def test_unexpected_entries_are_listed(tmp_path, config, weights):
    weights |= {f"extra\n{i}": np.zeros(1) for i in range(7)}
    message = save_and_fail(tmp_path, weights, config)
    assert "7 unexpected (extra\\n0, " in message
    assert "extra\\n5" not in message


def test_misshapen_entries_are_listed_with_both_shapes(tmp_path, config, weights):
    weights[WEIGHT] = weights[WEIGHT].T.copy()
    weights[COUNTER] = np.zeros(1, np.int64)
    message = save_and_fail(tmp_path, weights, config)
    assert f"{WEIGHT} is [64, 192], expected [192, 64]" in message
    assert f"{COUNTER} is [1], expected []" in message
    assert "2 misshapen" in message


def test_a_checkpoint_of_another_variant_is_recognised(tmp_path, config):
    # Names and shapes decide, so one number stands in for every tensor.
    state = meta_model(VARIANTS["tap_vit_l"]).state_dict()
    tensors = {n: torch.zeros((), dtype=t.dtype).expand(t.shape) for n, t in state.items()}
    torch.save(tensors, tmp_path / "large.pth")
    for other in (config, VARIANTS["tap_vit_b"]):
        message = load_error(tmp_path / "large.pth", other)
        assert "this looks like tap_vit_l: pass --model tap_vit_l" in message
    tensors.pop("pixel_mean")
    torch.save(tensors, tmp_path / "large.pth")
    message = load_error(tmp_path / "large.pth", VARIANTS["tap_vit_l"])
    assert "1 missing (pixel_mean)" in message
    assert "looks like" not in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_and_infinity_are_reported_by_name(tmp_path, config, weights, value, dtype):
    broken = weights[WEIGHT].astype(dtype)
    broken[3, 4] = value
    weights[WEIGHT] = broken
    assert f"entry {WEIGHT} contains NaN" in save_and_fail(tmp_path, weights, config)


def test_a_number_beyond_float32_is_reported(tmp_path, config, weights):
    weights["pixel_mean"] = np.array([1e39, 0, 0])
    assert "entry pixel_mean contains NaN or inf" in save_and_fail(tmp_path, weights, config)


def test_a_wrong_relative_position_index_is_reported(tmp_path, config, weights):
    weights[INDEX] = relative_index(16).numpy().T.copy()
    assert f"entry {INDEX} is wrong; expected the relative position index" in save_and_fail(
        tmp_path, weights, config
    )


@pytest.mark.parametrize("name", ["pixel_mean", "pixel_rsig"])
@pytest.mark.parametrize("factor", [1.0015, 0.9985, 1 / 255, -1.0])
def test_other_pixels_than_the_contract_promises_are_reported(
    tmp_path, config, weights, name, factor
):
    expected = [round(value, 6) for value in weights[name].tolist()]
    weights[name] = weights[name].copy()
    weights[name][1] *= factor
    message = save_and_fail(tmp_path, weights, config)
    found = [round(value, 6) for value in weights[name].tolist()]
    assert f"entry {name} is {found}; expected {expected}" in message


def test_pixels_in_the_order_rgb_are_reported(tmp_path, config, weights):
    weights["pixel_mean"] = weights["pixel_mean"][::-1].copy()
    assert "entry pixel_mean is [123.675" in save_and_fail(tmp_path, weights, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rounded_pixels_are_fine(tmp_path, config, weights, dtype):
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    for name in ("pixel_mean", "pixel_rsig"):
        state[name] = state[name].to(dtype)
    save_checkpoint(state, tmp_path / "micro.pth")
    load_checkpoint(tmp_path / "micro.pth", config)


ABSURD = [
    ({"encoder_depth": 4 * 10**9}, "field encoder_depth is 4000000000; expected at most 256"),
    ({"text_depth": 10**6}, "field text_depth"),
    ({"prompt_decoder_depth": 10**6}, "field prompt_decoder_depth"),
    ({"num_mask_tokens": 10**6}, "field num_mask_tokens"),
    ({"encoder_dim": 12 * 2**40}, "field encoder_dim"),
    ({"vocab_size": 2**80}, "field vocab_size"),
    ({"image_size": 16 * 10**9, "window_size": 10**9}, "field image_size"),
    (
        {"image_size": 2**13, "patch_size": 1, "window_size": 2**9},
        r"model with \d+ parameters; expected at most",
    ),
    ({"text_dim": 2**14}, r"model with \d+ parameters"),
    ({"encoder_dim": 12 * 2**10, "encoder_depth": 256}, r"model with \d+ parameters"),
]


@pytest.mark.parametrize(("sizes", "message"), ABSURD)
def test_absurd_sizes_are_reported_and_not_allocated(tmp_path, weights, sizes, message):
    with pytest.raises(InputError, match=message) as error:
        synthetic_model(TapConfig(**sizes))
    message_of(error)
    save_checkpoint({WEIGHT: weights[WEIGHT]}, tmp_path / "a.pkl")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "a.pkl", TapConfig(**sizes))


def test_synthetic_weights_beyond_the_memory_are_reported(config, monkeypatch):
    def no_memory(*args: object) -> None:
        raise MemoryError("Unable to allocate 8 TiB")

    monkeypatch.setattr(synthetic_module, "synthetic_array", no_memory)
    with pytest.raises(InputError, match="do not fit into memory"):
        synthetic_model(config)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_weights_of_an_unfit_dtype_are_reported(tmp_path, config, weights, dtype):
    weights[WEIGHT] = weights[WEIGHT].astype(dtype)
    assert f"entry {WEIGHT} is stored as {dtype}" in save_and_fail(tmp_path, weights, config)


def test_a_float_counter_is_reported(tmp_path, config, weights):
    weights[COUNTER] = np.array(1.5)
    assert f"entry {COUNTER} is stored as float64" in save_and_fail(tmp_path, weights, config)


# Files that hold something else


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([np.zeros(3)], "contains a list"),
        (np.zeros(3), "contains a ndarray"),
        (None, "contains a NoneType"),
        ({}, "contains an empty dict"),
        ({"model": {}}, "no entry pixel_rsig; found only empty dicts"),
        ({3: np.zeros(3)}, "a key of type int"),
        ({"a": np.array(["x", "y"])}, "entry a is an array of dtype <U1"),
        ({"a": "text"}, "entry a is a str"),
        ({"a": None}, "entry a is a NoneType"),
        ({"a\n\x1b[2J": [1.0]}, "entry a\\n\\x1b[2J is a list"),
        ({"epoch": 3, "net": {"a\n": np.zeros(3)}}, "no entry pixel_rsig; found epoch, net.a\\n"),
        ({3: {"a": np.zeros(3)}}, "no entry pixel_rsig; found only"),
        ({f"layer{i}": {"w": np.zeros(3)} for i in range(7)}, "layer4.w, ...; check that it is"),
    ],
)
def test_a_pickle_of_something_else_is_reported(tmp_path, content, expected):
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "other.pkl")
    assert expected in message_of(error)


def test_sparse_tensors_are_reported(tmp_path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="entry a is a tensor of layout"):
        read_checkpoint(tmp_path / "a.pth")


FOREIGN = {
    "a.txt": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "a.html": b"<!DOCTYPE html><html>404</html>",
    "a.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
    "a.onnx": b"\x08\x0a\x12\x07pytorch\x1a\x052.1.0",
    "a.safetensors": (2**40).to_bytes(8, "little") + b"{}",
    "b.safetensors": (2).to_bytes(8, "little") + b"{]",
    "c.safetensors": (40).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
    "a.pth": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_reported(tmp_path, config, name):
    (tmp_path / name).write_bytes(FOREIGN[name])
    assert name in load_error(tmp_path / name, config)


def test_pictures_archives_folders_and_nothing_are_reported(tmp_path, config):
    assert "coffee.jpg" in load_error(DATA / "coffee.jpg", config)
    assert "tap_micro_outputs.npz" in load_error(DATA / "tap_micro_outputs.npz", config)
    assert "No such file" in load_error(tmp_path / "nowhere.pkl", config)
    assert "directory" in load_error(tmp_path, config)
    (tmp_path / "empty.pkl").touch()
    assert "is empty" in load_error(tmp_path / "empty.pkl", config)


@pytest.mark.parametrize(
    ("suffix", "legacy"),
    [(".pkl", False), (".pth", False), (".pth", True), (".safetensors", False)],
)
def test_truncated_files_are_reported(tmp_path, config, weights, suffix, legacy):
    path = tmp_path / f"micro{suffix}"
    if legacy:
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        save_checkpoint(weights, path)
    whole = path.read_bytes()
    for length in (1, 2, 3, 9, 17, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        load_error(path, config)


def test_a_changed_byte_in_a_torch_archive_is_reported(tmp_path, config, weights):
    save_checkpoint(weights, tmp_path / "micro.pth")
    data = bytearray((tmp_path / "micro.pth").read_bytes())
    at = data.find(weights[WEIGHT].tobytes())
    assert at > 0
    data[at + 100] ^= 1
    (tmp_path / "micro.pth").write_bytes(data)
    assert "checksum" in load_error(tmp_path / "micro.pth", config)


def test_a_compressed_torch_archive_is_reported(tmp_path, config, weights):
    save_checkpoint(weights, tmp_path / "micro.pth")
    with (
        zipfile.ZipFile(tmp_path / "micro.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "compressed" in load_error(tmp_path / "packed.pth", config)


# Files that attack


class Shell:
    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluate:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_file_that_attacks_is_refused_by_name_and_not_run(tmp_path, config, legacy):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    content = {"a": torch.zeros(2), "b": Shell(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = load_error(path, config, UnsafeCheckpointError)
    assert f"{os.system.__module__}.system" in message
    assert "evil.pth" in message
    torch.save({"b": Evaluate()}, path, _use_new_zipfile_serialization=not legacy)
    assert "eval" in load_error(path, config, UnsafeCheckpointError)
    assert not marker.exists()


def test_a_whole_module_in_a_torch_file_is_refused(tmp_path, config):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    message = load_error(tmp_path / "module.pth", config, UnsafeCheckpointError)
    assert "torch.nn.modules.linear.Linear" in message


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_a_pickle_that_attacks_is_refused_under_any_name(tmp_path, config, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"evil{suffix}"
    path.write_bytes(pickle.dumps({WEIGHT: np.zeros(2), "b": Shell(marker)}))
    load_error(path, config, UnsafeCheckpointError)
    assert not marker.exists()


def test_tensors_in_a_plain_pickle_are_refused(tmp_path, config):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": torch.zeros(2)}))
    assert "torch." in load_error(tmp_path / "a.pkl", config, UnsafeCheckpointError)


# Saving


@pytest.mark.parametrize("name", ["micro.bin", "micro", "micro.onnx"])
def test_an_unknown_suffix_is_reported(tmp_path, weights, name):
    with pytest.raises(InputError, match=r"\.pkl, \.pth, \.pt, \.safetensors"):
        save_checkpoint(weights, tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_folder_is_reported(tmp_path, weights, suffix):
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*choose a folder"):
        save_checkpoint(weights, tmp_path / "nowhere" / f"micro{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, weights, suffix, monkeypatch):
    path = tmp_path / f"micro{suffix}"
    path.write_bytes(b"old")

    def full_disk(state: object, at: Path) -> None:
        at.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(checkpoint_module.WRITERS, suffix, full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_checkpoint(weights, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_save_replaces_the_old_file_with_one_that_others_can_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    save_checkpoint({"a": torch.zeros(2)}, path)
    assert read_checkpoint(path).state_dict["a"].tolist() == [0, 0]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    assert sorted(tmp_path.iterdir()) == sorted([path, ordinary])


def test_a_dtype_that_the_format_lacks_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint({"a": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "a.pkl")
    assert not list(tmp_path.iterdir())


def test_entries_that_share_memory_are_reported_by_safetensors(tmp_path):
    shared = torch.zeros(4)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint({"a": shared, "b": shared}, tmp_path / "a.safetensors")


def test_the_missing_package_is_named(tmp_path, weights, monkeypatch):
    save_checkpoint(weights, tmp_path / "micro.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        read_checkpoint(tmp_path / "micro.safetensors")
    with pytest.raises(MissingDependencyError, match="pip install"):
        save_checkpoint(weights, tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["micro.safetensors"]
