"""Graphs with one small fault each, for tests of what ``verify`` and ``selftest`` find."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from tap_deploy import graphs
from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.graph_files import write_model
from tap_deploy.bundle.manifest import MANIFEST_NAME, FileRecord
from tap_deploy.demo_model import DemoModel
from tap_deploy.export.text_decoder import rotation_table

ENCODER, PROMPTS, TEXT = graphs.GRAPH_NAMES
BACKGROUND, FOREGROUND, LEFT_TOP, RIGHT_BOTTOM, PADDING = range(5)

Edit = Callable[[ir.Model], None]
Change = Callable[[np.ndarray], "np.ndarray | float"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A fault in one graph of the demo bundle.

    Attributes:
        name: what is wrong.
        graph: name of the graph.
        edit: changes a model of the graph in place.
        equivalent: why the fault changes no answer; empty if it does.
        slow: whether only the long form of the tests takes it.
    """

    name: str
    graph: str
    edit: Edit
    equivalent: str = ""
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.graph}-{self.name}".replace(" ", "-")


def make_demo_bundle(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Export the demo model; returns the data files that went into it."""
    from tap_deploy.export.demo import export_demo

    demo = DemoModel()
    export_demo(demo, folder)
    return demo.weights, demo.config, demo.concepts, demo.tokenizer


def mutated_bundle(bundle: Bundle, mutant: Mutant, folder: pathlib.Path) -> Bundle:
    """Return a copy of a bundle with a mutated fp32 graph, and with the hashes of it."""
    shutil.copytree(bundle.path, folder, copy_function=os.link)
    model = bundle.variant("fp32").load(mutant.graph)
    mutant.edit(model)
    file = bundle.manifest.graphs["fp32"][mutant.graph].file
    (folder / file).unlink()  # not through the link
    write_model(model, folder / file)
    files = bundle.manifest.files | {file: FileRecord.of(folder / file)}
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    return Bundle.open(folder)


# Small changes of a graph.


def node(model: ir.Model, name: str) -> ir.Node:
    (found,) = (each for each in model.graph if each.name == name)
    return found


def weight(name: str, change: Change) -> Edit:
    """Return an edit that changes a weight for all nodes that use it."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        value.const_value = _tensor(value, change)

    return edit


def weight_at(name: str, index: int, change: Change) -> Edit:
    """Return an edit that changes a constant input of a node, for this node alone."""

    def edit(model: ir.Model) -> None:
        user = node(model, name)
        old = user.inputs[index]
        assert old is not None and old.is_initializer()
        made = ir.Value(name=f"{name}/{index}", shape=old.shape, type=old.type)
        made.const_value = _tensor(old, change)
        made.const_value.name = made.name
        model.graph.register_initializer(made)
        user.replace_input_with(index, made)

    return edit


def _tensor(value: ir.Value, change: Change) -> ir.Tensor:
    assert value.const_value is not None
    before = value.const_value.numpy()
    after = np.broadcast_to(np.asarray(change(before.copy()), before.dtype), before.shape)
    assert not np.array_equal(before, after), f"the change of {value.name} changes nothing"
    return ir.Tensor(np.ascontiguousarray(after), name=value.name)


def skipped(name: str, index: int = 0) -> Edit:
    """Return an edit that puts an input of a node in place of its output."""

    def edit(model: ir.Model) -> None:
        gone = node(model, name)
        value = gone.inputs[index]
        assert value is not None
        gone.outputs[0].replace_all_uses_with(value)
        model.graph.remove(gone, safe=True)

    return edit


def fed_by(name: str, index: int, source: str) -> Edit:
    """Return an edit that gives a node the output of another node as an input."""

    def edit(model: ir.Model) -> None:
        value = node(model, source).outputs[0]
        assert node(model, name).inputs[index] is not value
        node(model, name).replace_input_with(index, value)

    return edit


def swapped_inputs(name: str, first: int, second: int) -> Edit:
    def edit(model: ir.Model) -> None:
        user = node(model, name)
        a, b = user.inputs[first], user.inputs[second]
        user.replace_input_with(first, b)
        user.replace_input_with(second, a)

    return edit


def attribute(name: str, key: str, value: ir.Attr) -> Edit:
    def edit(model: ir.Model) -> None:
        user = node(model, name)
        assert user.attributes[key].value != value.value
        user.attributes[key] = value

    return edit


def epsilon(name: str, value: float) -> Edit:
    return attribute(name, "epsilon", ir.AttrFloat32("epsilon", value))


def tanh_gelu(name: str) -> Edit:
    return attribute(name, "approximate", ir.AttrString("approximate", "tanh"))


def axis(name: str, value: int) -> Edit:
    return attribute(name, "axis", ir.AttrInt64("axis", value))


def perm(name: str, *axes: int) -> Edit:
    return attribute(name, "perm", ir.AttrInt64s("perm", axes))


def op_type(name: str, value: str) -> Edit:
    def edit(model: ir.Model) -> None:
        node(model, name).op_type = value

    return edit


def fixed_shape(name: str, index: int, shape: Sequence[int]) -> Edit:
    """Return an edit that gives a node a constant shape."""

    def edit(model: ir.Model) -> None:
        made = ir.Value(
            name=f"{name}/{index}", const_value=ir.tensor(list(shape), ir.DataType.INT64)
        )
        made.const_value.name = made.name
        made.shape, made.type = ir.Shape([len(shape)]), ir.TensorType(ir.DataType.INT64)
        model.graph.register_initializer(made)
        node(model, name).replace_input_with(index, made)

    return edit


def before(name: str, index: int, kind: str, *others: np.ndarray) -> Edit:
    """Return an edit that puts an operator with constants before an input of a node."""

    def edit(model: ir.Model) -> None:
        user = node(model, name)
        constants = [
            model.graph.register_initializer(value) or value
            for number, array in enumerate(others)
            for value in [_constant(f"{name}/{kind}/{number}", array)]
        ]
        made = ir.node(kind, [user.inputs[index], *constants])
        made.name = f"{name}/{kind}"
        made.outputs[0].name = f"{name}/{kind}/output"
        model.graph.insert_before(user, made)
        user.replace_input_with(index, made.outputs[0])

    return edit


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(
        name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
    )


def together(*edits: Edit) -> Edit:
    def edit(model: ir.Model) -> None:
        for each in edits:
            each(model)

    return edit


# Changes of weights.


def zeroed(*rows: int) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array[list(rows)] = 0
        return array

    return change


def copied(row: int, to: int) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array[to] = array[row]
        return array

    return change


def exchanged(first: int, second: int, axis: int = 0) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        order = np.arange(array.shape[axis])
        order[[first, second]] = order[[second, first]]
        return array.take(order, axis)

    return change


def rolled(axis: int = 0) -> Change:
    return lambda array: np.roll(array, 1, axis)


def times(factor: float) -> Change:
    return lambda array: array * np.float32(factor)


def part_times(rows: slice, factor: float) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array[rows] *= factor
        return array

    return change


def heads_exchanged(heads: int, axis: int) -> Change:
    """Exchange the channels of the first two of several heads."""

    def change(array: np.ndarray) -> np.ndarray:
        size = array.shape[axis] // heads
        order = np.arange(array.shape[axis])
        order[: 2 * size] = np.roll(order[: 2 * size], size)
        return array.take(order, axis)

    return change


def transposed_grid(array: np.ndarray) -> np.ndarray:
    """Exchange x and y of a table of positions, row by row, ``[grid * grid, C]``."""
    side = round(len(array) ** 0.5)
    return array.reshape(side, side, -1).swapaxes(0, 1).reshape(array.shape)


def transposed_windows(array: np.ndarray) -> np.ndarray:
    """Exchange x and y of a table of positions in windows, ``[windows, S, D]``."""
    n, w = (round(size**0.5) for size in array.shape[:2])
    return array.reshape(n, n, w, w, -1).transpose(1, 0, 3, 2, 4).reshape(array.shape)


def rgb(array: np.ndarray) -> np.ndarray:
    """Reverse the colours of the inputs of the patch embedding, ``[D, p * p * 3]``."""
    return array.reshape(len(array), -1, 3)[..., ::-1].reshape(array.shape)


def half_pairs(array: np.ndarray) -> np.ndarray:
    """Pair channel i with channel i + half, as other models do, ``[positions, 64, 64]``."""
    order = np.arange(array.shape[1]).reshape(-1, 2).T.reshape(-1)
    wrong = np.empty_like(array)
    wrong[:, np.argsort(order)[:, None], np.argsort(order)] = array
    return wrong


def later_rotations(array: np.ndarray) -> np.ndarray:
    return rotation_table(len(array) + 1).numpy()[1:]


def _mutants(graph: str, edits: dict[str, Edit], *, slow: bool = False) -> list[Mutant]:
    return [Mutant(name=name, graph=graph, edit=edit, slow=slow) for name, edit in edits.items()]


def _equivalent(name: str, graph: str, edit: Edit, reason: str) -> Mutant:
    return Mutant(name=name, graph=graph, edit=edit, equivalent=reason)


BLOCK_0, BLOCK_1 = (f"decoder.transformer.blocks.{i}" for i in range(2))
LABELS = "prompt_encoder.point_embed.weight"

FAULTS = [
    *_mutants(
        ENCODER,
        {
            "RGB for BGR": together(
                weight("patch_embed.weight", rgb),
                weight("pixel_mean", lambda a: a[::-1]),
                weight("pixel_rsig", lambda a: a[::-1]),
            ),
            "mean in the order RGB": weight("pixel_mean", lambda a: a[::-1]),
            "std in the order RGB": weight("pixel_rsig", lambda a: a[::-1]),
            "bias of one Linear dropped": weight("blocks.3.mlp.fc2.bias", times(0)),
            "positions x and y swapped": weight("position_table", transposed_windows),
            "windows transposed": perm("Transpose", 0, 4, 1, 2, 5, 3, 6, 7),
            "LayerNorm epsilon 1e-3": epsilon("blocks.4.norm1/LayerNormalization", 1e-3),
            "attention scale doubled": weight_at("blocks.5.attn/Mul", 1, times(2)),
            "tanh GELU in one block": tanh_gelu("blocks.6.mlp.activation/Gelu"),
            "heads permuted": weight("blocks.2.attn.proj.weight.T", heads_exchanged(5, 0)),
            "weight times 1.01": weight("blocks.7.mlp.fc1.weight.T", times(1.01)),
        },
    ),
    *_mutants(
        ENCODER,
        {
            "mean off by half a grey level": weight("pixel_mean", lambda a: a + 0.5),
            "bias of the patches dropped": weight("patch_embed.bias", times(0)),
            "positions off by one": weight("position_table", rolled(axis=1)),
            "attention scale missing": weight_at("blocks.3.attn/Mul", 1, times(32**0.5)),
            "attention bias transposed": weight("blocks.1.attn.bias", lambda a: a.swapaxes(2, 3)),
            "softmax over queries": axis("blocks.4.attn/Softmax", -2),
            "tanh GELU between windows": tanh_gelu("cross_conv.1/Gelu_1"),
            "last norm skipped": skipped("norm/LayerNormalization"),
            "one row of weights times 1.01": weight(
                "blocks.0.attn.qkv.weight.T", part_times(slice(7, 8), 1.01)
            ),
            "MLP beside the attention": fed_by(
                "blocks.3.norm2/LayerNormalization", 0, "blocks.2/Add_1"
            ),
            "residual dropped": skipped("blocks.5/Add_1"),
            "kernel transposed": weight("output_conv.weight", lambda a: a.swapaxes(2, 3)),
        },
        slow=True,
    ),
    *_mutants(
        PROMPTS,
        {
            "labels of points swapped": weight(LABELS, exchanged(BACKGROUND, FOREGROUND)),
            "background dropped": weight(LABELS, zeroed(BACKGROUND)),
            "foreground for background": weight(LABELS, copied(FOREGROUND, to=BACKGROUND)),
            "padding dropped": weight(LABELS, zeroed(PADDING)),
            "centre of a pixel dropped": weight_at("prompt_encoder/Add", 1, times(0)),
            "points x and y swapped": weight("prompt_encoder.coord_matrix", lambda a: a[::-1]),
            "upper clip dropped": weight_at("prompt_encoder/Clip", 2, times(2)),
            "P baked in": fixed_shape("Expand", 1, (4, 1, 1)),
            "N baked in": weight_at("Add", 0, lambda a: a + 4),
            "masks of all prompts": together(skipped("Gather"), skipped("Gather_1")),
            "answer without the box bonus": weight("answering_token.bonus", times(0)),
            "columns of IoU swapped": together(
                weight("decoder.iou_pred.layers.2.weight", exchanged(0, 1)),
                weight("decoder.iou_pred.layers.2.bias", exchanged(0, 1)),
            ),
            "upscaling transposed": perm("upscaler/Transpose_1", 0, 1, 4, 5, 2, 3, 6),
            "softmax over the image": axis(f"{BLOCK_0}.cross_attn_image_to_token/Softmax", 3),
            "last norm skipped": skipped("decoder.transformer.final.norm/LayerNormalization"),
        },
    ),
    *_mutants(
        PROMPTS,
        {
            "labels of corners swapped": weight(LABELS, exchanged(LEFT_TOP, RIGHT_BOTTOM)),
            "foreground dropped": weight(LABELS, zeroed(FOREGROUND)),
            "padding with a position": weight_at("prompt_encoder/Equal", 1, lambda a: a + 1),
            "lower clip dropped": weight_at("prompt_encoder/Clip", 1, lambda a: a - 1),
            "positions x and y swapped": weight("image_position", transposed_grid),
            "positions off by one": weight("image_position", rolled()),
            "tokens of masks swapped": weight("own_tokens", exchanged(5, 6, axis=1)),
            "attention scale missing": weight_at(f"{BLOCK_0}.self_attn/Mul", 1, times(32**0.5)),
            "attention scale doubled": weight_at(
                f"{BLOCK_1}.cross_attn_token_to_image/Mul", 1, times(2)
            ),
            "heads permuted": weight_at(
                f"{BLOCK_1}.cross_attn_token_to_image/Mul_1", 1, exchanged(0, 1)
            ),
            "key without positions": fed_by(
                f"{BLOCK_1}.cross_attn_token_to_image/MatMul",
                0,
                f"{BLOCK_0}.norm4/LayerNormalization",
            ),
            "LayerNorm epsilon 1e-3": epsilon(f"{BLOCK_1}.norm2/LayerNormalization", 1e-3),
            "bias dropped": weight(f"{BLOCK_1}.mlp.fc2.bias", times(0)),
            "weight times 1.01": weight("decoder.sem_pred.layers.2.weight.T", times(1.01)),
            "heads of masks swapped": swapped_inputs("Concat_4", 0, 1),
            "box bonus for points": weight("answering_token.bonus", times(-1)),
            "tanh GELU in the upscaler": tanh_gelu("upscaler/Gelu"),
        },
        slow=True,
    ),
    *_mutants(
        TEXT,
        {
            "rotary pairs wrong": weight("rotations", half_pairs),
            "one slot too many": op_type("Less", "LessOrEqual"),
            "mask of the slots dropped": weight_at("Where_1", 2, times(0)),
            "attention scale missing": weight("blocks.1.qkv.weight", part_times(slice(0, 192), 8)),
            "tanh GELU in one block": tanh_gelu("blocks.0.mlp.activation/Gelu"),
            "LayerNorm epsilon 1e-6": epsilon("blocks.0.norm1/LayerNormalization", 1e-6),
            "last norm skipped": skipped("norm/LayerNormalization"),
            "bias dropped": weight("blocks.1.mlp.fc2.bias", times(0)),
            "row of an embedding zeroed": weight("tok_embeddings.weight", zeroed(300)),
            "rows of text_proj swapped": weight("text_proj.weight", exchanged(410, 411)),
            "noise ignored": skipped("Add"),
            "heads permuted": weight("blocks.1.proj.weight", heads_exchanged(3, 1)),
        },
    ),
    *_mutants(
        TEXT,
        {
            "rotation backwards": weight("rotations", lambda a: a.swapaxes(1, 2)),
            "one slot too few": before("Less", 0, "Add", np.array([1], np.int32)),
            "prefix at BOS": weight_at("Equal", 1, lambda a: a + 1),
            "caches of layers swapped": swapped_inputs("Concat", 0, 2),
            "attention scale doubled": weight("blocks.0.qkv.weight", part_times(slice(0, 192), 2)),
            "bias of the keys dropped": weight("blocks.0.qkv.bias", part_times(slice(192, 384), 0)),
            "softmax over nothing": axis("blocks.1/Softmax", -2),
            "LayerNorm epsilon 1e-3": epsilon("blocks.0.norm2/LayerNormalization", 1e-3),
            "weight times 1.01": weight("blocks.0.mlp.fc1.weight", times(1.01)),
            "rows of embeddings swapped": weight("tok_embeddings.weight", exchanged(410, 411)),
            "row of text_proj zeroed": weight("text_proj.weight", zeroed(300)),
            "columns of text_proj swapped": weight("text_proj.weight", exchanged(0, 1, axis=1)),
            "smallest logit": attribute("TopK", "largest", ir.AttrInt64("largest", 0)),
        },
        slow=True,
    ),
]

EQUIVALENT = [
    _equivalent(
        "LayerNorm epsilon 1e-6",
        ENCODER,
        epsilon("blocks.2.norm1/LayerNormalization", 1e-6),
        "the variance of its inputs is far above 1e-5",
    ),
    _equivalent(
        "LayerNorm epsilon 1e-6",
        PROMPTS,
        epsilon(f"{BLOCK_0}.norm2/LayerNormalization", 1e-6),
        "the variance of its inputs is far above 1e-5",
    ),
    _equivalent(
        "LayerNorm epsilon 1e-6",
        TEXT,
        epsilon("norm/LayerNormalization", 1e-6),
        "the variance of its inputs is far above 1e-5",
    ),
    _equivalent(
        "bias of the keys dropped",
        ENCODER,
        weight("blocks.2.attn.qkv.bias", part_times(slice(160, 320), 0)),
        "it adds the same to all scores of a query, and softmax cancels that",
    ),
    _equivalent(
        "residual added in the other order",
        ENCODER,
        swapped_inputs("blocks.3/Add", 0, 1),
        "addition is commutative",
    ),
    _equivalent(
        "heads in another order",
        PROMPTS,
        weight("decoder.transformer.blocks.0.cross_attn_image_to_token.mask", exchanged(0, 1)),
        "all products of an attention take the same mask, and heads are summed",
    ),
    _equivalent(
        "pi of full precision",
        PROMPTS,
        together(
            weight_at("prompt_encoder/Mul", 1, lambda a: 4 * np.pi),
            weight_at("prompt_encoder/Sub", 1, lambda a: 2 * np.pi),
        ),
        "angles differ by 2e-8 of their size",
    ),
    _equivalent(
        "rotations one position later",
        TEXT,
        weight("rotations", later_rotations),
        "scores depend on the distance of positions only",
    ),
]
