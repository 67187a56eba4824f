"""The exported graphs: their operators, and their agreement with the reference."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import CheckpointRecord
from tap_deploy.errors import BundleError, InputError, VerificationError
from tap_deploy.export import bundle_export
from tap_deploy.export.folding import (
    folded_conv,
    linear_from_conv_transpose,
    scaled_queries,
)
from tap_deploy.export.prompt_decoder import AnsweringToken
from tap_deploy.export.text_decoder import rotation_table
from tap_deploy.masks import select_mask_token
from tap_deploy.reference.text_decoder import rotary_table, rotate_interleaved
from tap_deploy.sessions.caption_steps import step_inputs
from tap_deploy.sessions.opening import create_session, sessions_from_variant
from tap_deploy.sessions.ort.session import OnnxRuntimeSession
from tap_deploy.storage.files import atomic_folder

RECORD = CheckpointRecord(file="made", sha256="", md5="", known_as=None, synthetic=True)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(micro_bundle):
    return {name: onnx.load(micro_bundle.variant("fp32").path(name)) for name in graphs.GRAPH_NAMES}


@pytest.fixture(scope="module")
def sessions(micro_bundle):
    return sessions_from_variant(micro_bundle.variant("fp32"))


def op_counts(model):
    counts = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_graph_is_portable(models, micro_bundle, name):
    model = models[name]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert model.ir_version <= 10
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)
    record = micro_bundle.manifest.graphs["fp32"][name]
    assert record.op_types == op_counts(model)
    assert record.num_nodes == len(model.graph.node)


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_axes_names_and_types_are_those_of_the_spec(models, micro_bundle, name):
    spec = micro_bundle.variant("fp32").specs[name]
    for values, tensors in (
        (models[name].graph.input, spec.inputs),
        (models[name].graph.output, spec.outputs),
    ):
        for value, tensor in zip(values, tensors, strict=True):
            kind = value.type.tensor_type
            shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            assert (value.name, dtype, shape) == (tensor.name, tensor.dtype, tensor.shape)


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_every_tensor_has_an_inferred_shape(models, name):
    inferred = onnx.shape_inference.infer_shapes(models[name], strict_mode=True, data_prop=True)
    known = {value.name for value in inferred.graph.value_info}
    known |= {value.name for value in inferred.graph.output}
    made = {output for node in inferred.graph.node for output in node.output if output}
    assert made <= known


@pytest.mark.parametrize("name", graphs.GRAPH_NAMES)
def test_nothing_of_the_exporting_machine_is_left(models, name):
    for node in models[name].graph.node:
        assert not node.doc_string
        assert not node.metadata_props
    assert b".py" not in models[name].SerializeToString()


def test_image_encoder_ops(models, micro_config):
    """BatchNorm and the position bias are folded; norm and GELU are one op each; no shape ops."""
    counts = op_counts(models[graphs.IMAGE_ENCODER])
    depth = micro_config.encoder_depth
    assert counts["LayerNormalization"] == 2 * depth + 1
    assert counts["Gelu"] == depth + 8
    assert counts["Softmax"] == depth
    folded_away = ("BatchNormalization", "Gather", "Shape", "Erf", "Pow", "ReduceMean", "Where")
    assert not set(folded_away) & set(counts)


def test_attention_bias_is_a_constant_before_the_softmax(models):
    graph = models[graphs.IMAGE_ENCODER].graph
    constants = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert softmaxes
    for softmax in softmaxes:
        add = producers[softmax.input[0]]
        assert add.op_type == "Add"
        assert set(add.input) & constants
        scores = next(producers[name] for name in add.input if name in producers)
        assert scores.op_type == "MatMul"
        assert producers[scores.input[0]].op_type == "Mul"  # the scale sits on Q


def test_nodes_are_named_after_modules(models):
    names = [node.name for node in models[graphs.IMAGE_ENCODER].graph.node]
    assert len(set(names)) == len(names)
    assert "blocks.3.mlp.fc1/MatMul" in names
    weights = {tensor.name for tensor in models[graphs.IMAGE_ENCODER].graph.initializer}
    assert "blocks.3.mlp.fc1.weight.T" in weights


def test_text_decoder_stores_its_weights_once(models, micro_model):
    stored = sum(
        int(np.prod(tensor.dims)) for tensor in models[graphs.TEXT_DECODER].graph.initializer
    )
    parameters = sum(p.numel() for p in micro_model.text_decoder.parameters())
    rotations = 40 * 64**2
    assert stored - rotations < 1.05 * parameters


@pytest.mark.parametrize(
    ("prompts", "points", "asked_for"), [(1, 1, 1), (1, 2, 4), (2, 9, 3), (9, 3, 1), (17, 2, 6)]
)
def test_prompt_decoder_takes_any_size(sessions, micro_model, golden, prompts, points, asked_for):
    rng = np.random.default_rng(prompts)
    coords = rng.uniform(-3, 520, (prompts, points, 2)).astype(np.float32)
    labels = rng.integers(0, 5, (prompts, points)).astype(np.int32)
    request = rng.integers(-1, 4, (prompts, asked_for)).astype(np.int32)
    with_masks = rng.integers(0, prompts, max(1, prompts - 3)).astype(np.int32)
    embeddings = golden["image_embeddings"][:1]
    actual = sessions[graphs.PROMPT_DECODER].run(
        {
            graphs.IMAGE_EMBEDDINGS: embeddings,
            graphs.POINT_COORDS: coords,
            graphs.POINT_LABELS: labels,
            graphs.MASK_REQUEST: request,
            graphs.MASK_ROWS: with_masks,
        }
    )
    with torch.inference_mode():
        outputs = micro_model.decode_prompts(*map(torch.from_numpy, (embeddings, coords, labels)))
    expected = {name: value.numpy() for name, value in outputs._asdict().items()}
    scores = expected[graphs.IOU_PREDICTIONS]
    answering = select_mask_token(scores, labels)[:, None]
    index = np.where(request == graphs.ANSWERING_TOKEN, answering, request)
    np.testing.assert_array_equal(actual[graphs.MASK_INDEX], index)
    for name, value in expected.items():
        rows = (
            value if name == graphs.IOU_PREDICTIONS else value[np.arange(prompts)[:, None], index]
        )
        rows = rows[with_masks] if name == graphs.LOW_RES_MASKS else rows
        np.testing.assert_allclose(actual[name], rows, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("batch", [1, 3])
def test_image_encoder_takes_any_batch(sessions, golden, batch):
    images = golden["model_image"][[0, 1, 0][:batch]]
    actual = sessions[graphs.IMAGE_ENCODER].run({graphs.IMAGES: images})
    expected = golden["image_embeddings"][[0, 1, 0][:batch]]
    np.testing.assert_allclose(actual[graphs.IMAGE_EMBEDDINGS], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_answering_token_is_that_of_the_rule(dtype):
    """Bit-identical, also for ties, which occur in fp16."""
    rng = np.random.default_rng(0)
    iou = torch.from_numpy(rng.uniform(-0.2, 1.2, (4000, 4))).to(dtype)
    iou[::3, 1:] = torch.from_numpy(rng.choice([0.5, 0.75, 1], (1334, 3))).to(dtype)
    labels = rng.integers(0, 5, (4000, 3)).astype(np.int32)
    rule = AnsweringToken(4).to(dtype)
    found = rule(iou, torch.from_numpy(labels))
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found[:, 0], select_mask_token(iou.numpy(), labels))
    broken = torch.full((1, 4), torch.nan, dtype=dtype)
    assert rule(broken, torch.ones((1, 2), dtype=torch.int32)).item() in range(4)


def text_step(session, config, golden, position, cache):
    rows = np.arange(8)
    tokens = np.ascontiguousarray(golden["semantic_tokens"][rows, golden["mask_index"]])
    ids = golden["text_tokens"][:, max(0, position - 1)]
    return session.run(step_inputs(config, tokens, ids, position, cache))


@pytest.mark.parametrize("slots", ["exact", "whole cache"])
def test_text_decoder_at_every_length(sessions, micro_config, golden, slots):
    """Golden tokens at every position, with the exact past and with a masked full cache.

    Unfilled slots contain garbage, which must not matter.
    """
    session = sessions[graphs.TEXT_DECODER]
    shape = graphs.kv_cache_shape(micro_config, 8, micro_config.text_seq_len)
    cache = np.random.default_rng(0).normal(0, 50, shape).astype(np.float32)
    for position in range(micro_config.max_new_tokens + 1):
        shown = cache if slots == "whole cache" else cache[..., : max(1, position), :]
        outputs = text_step(session, micro_config, golden, position, shown.copy())
        cache[..., position, :] = outputs[graphs.PRESENT_KEY_VALUES]
        if position == 0:
            continue
        expected = golden["text_tokens"][:, position]
        np.testing.assert_array_equal(outputs[graphs.NEXT_IDS], expected)
        if position <= 3:
            np.testing.assert_allclose(
                outputs[graphs.LOGITS],
                golden["text_logits_first3"][:, position - 1],
                rtol=0,
                atol=TOLERANCE,
            )


def test_folded_conv_equals_conv_and_norm():
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 5, 3, bias=False), torch.nn.BatchNorm2d(5)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded_conv(conv, norm)(x), norm.eval()(conv(x)))


def test_linear_equals_conv_transpose():
    torch.manual_seed(0)
    conv = torch.nn.ConvTranspose2d(6, 4, 2, stride=2)
    x = torch.randn(2, 6, 3, 5)
    blocks = linear_from_conv_transpose(conv)(x.permute(0, 2, 3, 1)).reshape(2, 3, 5, 2, 2, 4)
    actual = blocks.permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 6, 10)
    torch.testing.assert_close(actual, conv(x))


def test_a_rotation_is_one_product():
    x, position = torch.randn(2, 3, 1, 64, dtype=torch.float64), 7
    cos, sin = (table[position].double() for table in rotary_table(10))
    expected = rotate_interleaved(x, cos, sin)
    torch.testing.assert_close(x @ rotation_table(10)[position].double(), expected)


def test_scaled_queries_change_no_bit_of_the_scores():
    torch.manual_seed(0)
    qkv = torch.nn.Linear(128, 384)
    x = torch.randn(4, 128)
    q, k, v = qkv(x).chunk(3, dim=-1)
    scaled, same_k, same_v = scaled_queries(qkv)(x).chunk(3, dim=-1)
    assert torch.equal(scaled, q * 64**-0.5)
    assert torch.equal(k, same_k) and torch.equal(v, same_v)


def test_a_graph_that_differs_leaves_no_bundle(micro_model, tmp_path, monkeypatch):
    """A wrapper with one wrong weight must be detected, and no files must be left."""

    class Wrong(bundle_export.PromptDecoderGraph):
        def __init__(self, model):
            model = copy.deepcopy(model)
            with torch.inference_mode(False), torch.no_grad():
                model.image_decoder.iou_pred.layers[2].bias += 0.01
            super().__init__(model)

    closed = []
    monkeypatch.setattr(OnnxRuntimeSession, "close", lambda session: closed.append(session))
    monkeypatch.setitem(bundle_export.WRAPPERS, graphs.PROMPT_DECODER, Wrong)
    with pytest.raises(VerificationError, match="prompt_decoder iou_predictions"):
        bundle_export.export_bundle(
            micro_model, tmp_path / "bundle", name="wrong", checkpoint=RECORD
        )
    assert list(tmp_path.iterdir()) == []
    assert len(closed) == 3


def test_an_interrupted_export_leaves_nothing(micro_model, tmp_path):
    def interrupt(stage):
        if stage == "export text_decoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle_export.export_bundle(
            micro_model, tmp_path / "bundle", name="x", checkpoint=RECORD, on_stage=interrupt
        )
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_that_looks_done(tmp_path, assets):
    """SIGKILL runs no clean-up: what is left is hidden, no bundle, and soon removed."""
    folder = tmp_path / "out"
    folder.mkdir()
    code = "from tap_deploy.cli import main; main()"
    options = ["--config", assets["config"], "--synthetic-weights", "0", "-o", folder / "bundle"]
    command = [sys.executable, "-c", code, "export", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not list(folder.rglob("*.onnx")):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    left, lock = sorted(folder.iterdir())
    assert left.name.startswith(".bundle.partial-") and lock.name == f"{left.name}.lock"
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(left)
    assert not (folder / "bundle").exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder / "other", marker="x"):
        raise KeyboardInterrupt
    assert list(folder.iterdir()) == []


def test_existing_output_needs_force(micro_model, tmp_path):
    (tmp_path / "bundle").mkdir()
    with pytest.raises(InputError, match="already exists; pass --force"):
        bundle_export.export_bundle(micro_model, tmp_path / "bundle", name="x", checkpoint=RECORD)


def test_concepts_and_tokenizer_must_fit_the_model(micro_model, tmp_path, assets):
    from tap_deploy.concepts import Vocabulary

    Vocabulary(weights=np.ones((95, 2), np.float32), names=("a", "b")).save(tmp_path / "c.npz")
    with pytest.raises(InputError, match=r"95 rows; expected 96"):
        bundle_export.export_bundle(
            micro_model,
            tmp_path / "bundle",
            name="x",
            checkpoint=RECORD,
            concepts=tmp_path / "c.npz",
        )
    wider = copy.copy(micro_model)
    wider.config = micro_model.config.__class__(
        **{**micro_model.config.to_dict(), "vocab_size": 501}
    )
    with pytest.raises(InputError, match=r"500 pieces; expected 501"):
        bundle_export.export_bundle(
            wider,
            tmp_path / "bundle",
            name="x",
            checkpoint=RECORD,
            tokenizer=assets["tokenizer"],
        )


def test_weights_beyond_the_limit_go_to_a_file_of_their_own(
    micro_model, micro_config, tmp_path, monkeypatch
):
    from tap_deploy.bundle import graph_files as onnx_files
    from tap_deploy.export import exporter

    monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_BYTES", 1000)
    spec = graphs.graph_specs(micro_config)[graphs.TEXT_DECODER]
    wrapper = bundle_export.WRAPPERS[graphs.TEXT_DECODER](micro_model)
    record = exporter.export_graph(wrapper, spec, micro_config, tmp_path, "text_decoder.onnx")
    assert record.external_data
    assert (tmp_path / "text_decoder.onnx.data").stat().st_size > 1_000_000
    assert (tmp_path / "text_decoder.onnx").stat().st_size < 200_000
    create_session("onnxruntime", tmp_path / record.file, spec)


def test_a_graph_that_has_become_small_does_not_refer_to_the_file_of_the_large_one(
    micro_bundle, tmp_path
):
    """As the int8 form of a graph whose fp32 weights lie beside it."""
    import onnx_ir as ir

    from tap_deploy.bundle.graph_files import save_graph

    large = tmp_path / "large" / "text_decoder.onnx"
    large.parent.mkdir()
    source = ir.load(micro_bundle.variant("fp32").path(graphs.TEXT_DECODER))
    ir.save(source, large, external_data="text_decoder.onnx.data")
    spec = micro_bundle.variant("fp32").specs[graphs.TEXT_DECODER]
    record = save_graph(ir.load(large), spec, tmp_path, "small.onnx")
    assert not record.external_data
    create_session("onnxruntime", tmp_path / record.file, spec)
