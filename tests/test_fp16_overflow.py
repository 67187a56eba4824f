"""A checkpoint that overflows fp16, as TAP v1.0 can: fp32 islands work, a plain cast does not.

Large biases of queries and keys make scores beyond 65504 that softmax never notices, since it
sees differences only. A residual stream in the thousands, which LayerNormalization takes back to
one, overflows when it is squared. Neither changes what the model says much, so that every digit
that is lost shows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import onnx_ir as ir

from tap_deploy import graphs
from tap_deploy.bundle.graph_files import save_graph
from tap_deploy.engines.fp16.convert import add_fp16
from tap_deploy.engines.fp16.islands import FP16_MAX, Reason
from tap_deploy.engines.fp16.rounding import load_rounding
from tap_deploy.engines.fp16.typed import half_from_single
from tap_deploy.sessions.opening import create_session
from tap_deploy.verify.comparison import compare
from tap_deploy.verify.tolerances import FP16_TOLERANCES

STREAM_SCALE = 300  # more makes the weights that read the stream subnormal in fp16
SCORES_BEFORE_SOFTMAX = ("blocks.1.attn/MatMul", "blocks.2.attn/MatMul")


def overflowing(model):
    """Change the weights of a model so that fp16 overflows, in place."""
    encoder, dim = model.image_encoder, model.config.encoder_dim
    into_stream = [encoder.patch_embed.proj, *(block.attn.proj for block in encoder.blocks)]
    into_stream += [block.mlp.fc2 for block in encoder.blocks]
    with torch.no_grad():
        for layer in into_stream:
            layer.weight *= STREAM_SCALE
            layer.bias *= STREAM_SCALE
        encoder.pos_embed.weight *= STREAM_SCALE
        for bottleneck in encoder.cross_conv[:-1]:  # the last one follows LayerNormalization
            bottleneck.conv1.weight /= STREAM_SCALE
            bottleneck.norm3.weight *= STREAM_SCALE
            bottleneck.norm3.bias *= STREAM_SCALE
        for block in encoder.blocks[1:3]:
            block.attn.qkv.bias[: 2 * dim] += 180  # q and k
        cross = model.image_decoder.transformer.blocks[1].cross_attn_image_to_token
        cross.q_proj.bias += 180
        cross.k_proj.bias += 180
    return model


@pytest.fixture(scope="module")
def bundle(micro_config, tmp_path_factory):
    from tap_deploy.bundle.manifest import CheckpointRecord
    from tap_deploy.export import samples
    from tap_deploy.export.bundle_export import export_bundle
    from tap_deploy.reference.synthetic import synthetic_model

    record = CheckpointRecord(file="made", sha256="", md5="", known_as=None, synthetic=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "GOLDEN_SIZES", samples.GOLDEN_SIZES[:1])
        return export_bundle(
            overflowing(synthetic_model(micro_config, 0)),
            tmp_path_factory.mktemp("overflow") / "bundle",
            name="overflowing",
            checkpoint=record,
        ).bundle


@pytest.fixture(scope="module")
def converted(bundle):
    return add_fp16(bundle)


@pytest.fixture(scope="module")
def sample(bundle):
    return bundle.golden().samples[0]


def feeds(bundle, sample):
    dtype = np.float16
    return {
        graphs.IMAGE_ENCODER: {graphs.IMAGES: sample.images},
        graphs.PROMPT_DECODER: {
            graphs.IMAGE_EMBEDDINGS: sample.image_embeddings.astype(dtype),
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
            graphs.MASK_REQUEST: np.tile(np.arange(4, dtype=np.int32), (4, 1)),
            graphs.MASK_ROWS: np.arange(4, dtype=np.int32),
        },
    }


def misses(outputs, sample):
    return [
        name
        for name, actual in outputs.items()
        if name != graphs.MASK_INDEX
        and not compare("g", name, "s", actual, getattr(sample, name), FP16_TOLERANCES[name]).passed
    ]


def test_scores_and_residual_stream_are_as_large_as_said(converted):
    found = {i.node: i for i in converted.islands[graphs.IMAGE_ENCODER].values()}
    for node in SCORES_BEFORE_SOFTMAX:
        assert found[node].max_abs > FP16_MAX
        assert found[node].reason == Reason.OVERFLOW
    assert found["blocks.3.norm1/LayerNormalization"].max_abs > 1000


def test_islands_bring_it_within_tolerance(converted):
    assert converted.report.passed, str(converted.report)
    for check in converted.report.checks:
        assert np.isfinite(check.max_abs)
        bounded = check.mean_tolerance is not None or check.is_chained
        assert bounded or check.tensor in ("caption_ids", "mask_index")


def test_the_whole_way_to_the_softmax_is_fp32(bundle, converted):
    """From LayerNormalization through q and k, and no further: values and projection are fp16."""
    graph = ir.load(bundle.variant("fp16").path(graphs.IMAGE_ENCODER)).graph
    dtypes = {node.name: node.outputs[0].dtype for node in graph}
    for node in ("qkv/MatMul", "qkv/Add", "Split", "Mul", "MatMul", "Add", "Softmax"):
        for block in (1, 2):
            separator = "." if node.startswith("qkv") else "/"
            name = f"blocks.{block}.attn{separator}{node}"
            assert dtypes[name] == ir.DataType.FLOAT, name
    for name in ("blocks.1.attn/MatMul_1", "blocks.1.attn.proj/MatMul", "blocks.0.attn/MatMul"):
        assert dtypes[name] == ir.DataType.FLOAT16, name


@pytest.mark.parametrize("name", [graphs.IMAGE_ENCODER, graphs.PROMPT_DECODER])
def test_a_naive_cast_fails_where_ours_passes(bundle, converted, sample, tmp_path, name):
    """Everything in fp16 except the coordinates, which are fp32 by contract."""
    spec = bundle.variant("fp16").specs[name]
    model = ir.load(bundle.variant("fp32").path(name))
    half_from_single(model, spec, islands=())
    save_graph(model, spec, tmp_path, "naive.onnx")
    feed = feeds(bundle, sample)[name]
    naive = load_rounding(tmp_path / "naive.onnx", spec).run(feed)
    assert set(misses(naive, sample)) == set(naive) - {graphs.MASK_INDEX}
    if name == graphs.IMAGE_ENCODER:
        assert not np.isfinite(naive[graphs.IMAGE_EMBEDDINGS]).any()
    ours = load_rounding(bundle.variant("fp16").path(name), spec).run(feed)
    assert misses(ours, sample) == []


def test_islands_by_the_limit_alone_are_too_coarse(bundle, converted, sample, tmp_path):
    """Finite values are not enough: rounding queries and keys of 180 to fp16 breaks the scores."""
    name = graphs.IMAGE_ENCODER
    spec = bundle.variant("fp16").specs[name]
    islands = {node for node, i in converted.islands[name].items() if i.reason is not Reason.SCORES}
    model = ir.load(bundle.variant("fp32").path(name))
    half_from_single(model, spec, islands)
    save_graph(model, spec, tmp_path, "coarse.onnx")
    outputs = load_rounding(tmp_path / "coarse.onnx", spec).run(feeds(bundle, sample)[name])
    assert np.isfinite(outputs[graphs.IMAGE_EMBEDDINGS]).all()
    assert misses(outputs, sample) == [graphs.IMAGE_EMBEDDINGS]


def test_onnxruntime_by_itself_hides_it(bundle, converted, sample, tmp_path):
    """Its CPU provider gives finite results for the naive cast, hence the rounding."""
    name = graphs.IMAGE_ENCODER
    spec = bundle.variant("fp16").specs[name]
    model = ir.load(bundle.variant("fp32").path(name))
    half_from_single(model, spec, islands=())
    save_graph(model, spec, tmp_path, "naive.onnx")
    session = create_session("onnxruntime", tmp_path / "naive.onnx", spec)
    outputs = session.run({graphs.IMAGES: sample.images})
    assert np.isfinite(outputs[graphs.IMAGE_EMBEDDINGS]).all()


def test_the_record_says_what_was_found(bundle, converted):
    record = bundle.manifest.precisions["fp16"]
    listed = record.fp16_graphs[graphs.IMAGE_ENCODER].islands
    assert [dataclasses.asdict(i) for i in converted.islands[graphs.IMAGE_ENCODER].values()] == [
        dataclasses.asdict(entry) | {"reason": Reason(entry.reason)} for entry in listed
    ]
    assert {"activation near the fp16 limit", "attention scores too large for fp16 steps"} <= {
        entry.reason for entry in listed
    }
