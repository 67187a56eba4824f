"""The search excludes the fewest blocks; budgets and exclusion lists are read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")
from tap_deploy.config import TapConfig
from tap_deploy.engines.int8.blocks import Exclusions, block_of, nodes_by_block
from tap_deploy.engines.int8.budget import AccuracyBudget
from tap_deploy.engines.int8.mix import MixSearch
from tap_deploy.engines.verdict.captions import CaptionAgreement
from tap_deploy.engines.verdict.tally import Agreement
from tap_deploy.errors import InputError
from tap_deploy.graphs import IMAGE_ENCODER, TEXT_DECODER, graph_specs
from tap_deploy.sessions.fake import FakeSession


def agreement(
    mask_iou: float = 1.0, top1: float | None = 1.0, tokens: float = 1.0, sqnr: float = 50.0
) -> Agreement:
    captions = CaptionAgreement(
        tokens_equal=tokens,
        identical=tokens,
        divergences=0,
        median_position=None,
        median_margin=None,
        largest_margin=None,
    )
    return Agreement(
        images=1,
        regions=10,
        mask_iou=mask_iou,
        mask_iou_worst=mask_iou,
        same_mask_token=1,
        concept_top1=top1,
        iou_drift=0,
        captions=captions,
        sqnr_db={"low_res_masks": sqnr},
    )


class PartSession(FakeSession):
    """Remembers which of its nodes are quantized."""

    def __init__(self, config: TapConfig, graph: str, nodes: Sequence[str]) -> None:
        super().__init__(graph_specs(config)[graph])
        self.nodes = tuple(nodes)


class AdditiveAnswers:
    """A model whose masks lose a fixed amount of IoU for each quantized node."""

    def __init__(self, losses: Mapping[str, float]) -> None:
        self.losses = losses
        self.trials: list[set[str]] = []

    def agreement(self, sessions: Mapping[str, PartSession]) -> Agreement:
        assert not any(session.closed for session in sessions.values())
        quantized = {node for session in sessions.values() for node in session.nodes}
        self.trials.append(quantized)
        loss = sum(self.losses.get(node, 0) for node in quantized)
        return agreement(mask_iou=1 - loss, sqnr=50 - 100 * loss)


def search(config: TapConfig, losses: Mapping[str, float], budget: str) -> tuple[Any, Any, Any]:
    nodes = {
        IMAGE_ENCODER: [f"blocks.{i}.{part}/MatMul" for i in range(4) for part in ("attn", "mlp")],
        TEXT_DECODER: ["blocks.0.qkv/Gemm", "blocks.0.proj/Gemm"],
    }
    made: list[PartSession] = []

    def session_for(graph: str, wanted: Sequence[str]) -> PartSession:
        made.append(PartSession(config, graph, wanted))
        return made[-1]

    answers: Any = AdditiveAnswers(losses)
    searching = MixSearch(answers, nodes, session_for, AccuracyBudget.parse(budget))
    mix = searching.run()
    assert all(session.closed for session in made)
    return mix, answers, nodes


def test_one_trial_is_enough_if_everything_may_be_quantized(micro_config):
    mix, answers, nodes = search(micro_config, {"blocks.1.mlp/MatMul": 0.004}, "miou=0.005")
    assert len(answers.trials) == 1
    assert answers.trials[0] == {node for names in nodes.values() for node in names}
    assert mix.within_budget and not mix.exclusions.entries and not mix.ranking


def test_the_fewest_of_the_worst_blocks_are_excluded(micro_config):
    losses = {
        "blocks.3.mlp/MatMul": 0.05,
        "blocks.0.attn/MatMul": 0.02,
        "blocks.2.mlp/MatMul": 0.003,
        "blocks.0.proj/Gemm": 0.01,
    }
    mix, answers, _ = search(micro_config, losses, "miou=0.005")
    assert mix.exclusions.to_dict() == {
        IMAGE_ENCODER: ["blocks.3.mlp", "blocks.0.attn"],
        TEXT_DECODER: ["blocks.0.proj"],
    }
    assert mix.within_budget
    assert mix.agreement.mask_iou == pytest.approx(0.997)
    assert mix.everything_quantized.mask_iou == pytest.approx(0.917)
    worst = [(block.graph, block.block) for block in mix.ranking[:3]]
    assert worst == [
        (IMAGE_ENCODER, "blocks.3.mlp"),
        (IMAGE_ENCODER, "blocks.0.attn"),
        (TEXT_DECODER, "blocks.0.proj"),
    ]
    # Every block alone, once.
    assert sum(len(trial) == 1 for trial in answers.trials) >= 10


def test_a_block_that_proves_harmless_in_company_is_quantized_again(micro_config):
    class Interacting(AdditiveAnswers):
        """The error of one block disappears if another block is float."""

        def agreement(self, sessions: Mapping[str, PartSession]) -> Agreement:
            quantized = {node for session in sessions.values() for node in session.nodes}
            alone = len(quantized) == 1
            loss = 0.03 if quantized & {"blocks.1.mlp/MatMul"} else 0
            if alone and quantized == {"blocks.2.mlp/MatMul"}:
                loss = 0.04  # looks the worst, and is not
            self.trials.append(quantized)
            return agreement(mask_iou=1 - loss)

    nodes = {IMAGE_ENCODER: [f"blocks.{i}.mlp/MatMul" for i in range(4)]}
    answers: Any = Interacting({})
    found = MixSearch(
        answers,
        nodes,
        lambda graph, wanted: PartSession(micro_config, graph, wanted),
        AccuracyBudget(mask_iou=0.01),
    ).run()
    assert found.ranking[0].block == "blocks.2.mlp"
    assert found.exclusions.to_dict() == {IMAGE_ENCODER: ["blocks.1.mlp"]}
    assert found.within_budget


def test_if_one_of_two_may_be_quantized_again_it_is_the_less_harmful(micro_config):
    alone = {f"blocks.{i}.mlp/MatMul": loss for i, loss in enumerate((0.05, 0.04, 0.03, 0))}
    together = {f"blocks.{i}.mlp/MatMul": loss for i, loss in enumerate((0.006, 0.006, 0.02, 0))}

    class InCompany(AdditiveAnswers):
        """The first two blocks do less harm with others: the budget allows either, but not both."""

        def agreement(self, sessions: Mapping[str, PartSession]) -> Agreement:
            quantized = {node for session in sessions.values() for node in session.nodes}
            losses = alone if len(quantized) == 1 else together
            return agreement(mask_iou=1 - sum(losses[node] for node in quantized))

    answers: Any = InCompany({})
    found = MixSearch(
        answers,
        {IMAGE_ENCODER: list(alone)},
        lambda graph, wanted: PartSession(micro_config, graph, wanted),
        AccuracyBudget(mask_iou=0.01),
    ).run()
    assert found.exclusions.to_dict() == {IMAGE_ENCODER: ["blocks.0.mlp", "blocks.2.mlp"]}
    assert found.within_budget


def test_a_budget_that_cannot_be_held_is_said_so(micro_config):
    class Hopeless(AdditiveAnswers):
        def agreement(self, sessions: Mapping[str, PartSession]) -> Agreement:
            return agreement(mask_iou=0.5)

    answers: Any = Hopeless({})
    nodes = {IMAGE_ENCODER: ["blocks.0.mlp/MatMul", "blocks.1.mlp/MatMul"]}
    found = MixSearch(
        answers,
        nodes,
        lambda graph, wanted: PartSession(micro_config, graph, wanted),
        AccuracyBudget(mask_iou=0.01),
    ).run()
    assert not found.within_budget
    assert len(found.exclusions) == 2


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("blocks.3.mlp.fc1/MatMul", "blocks.3.mlp"),
        ("blocks.3.attn.qkv/MatMul", "blocks.3.attn"),
        ("blocks.3.attn/MatMul_1", "blocks.3.attn"),
        ("blocks.11.qkv/Gemm", "blocks.11.qkv"),
        ("cross_conv.2.conv1/MatMul", "cross_conv.2"),
        ("output_conv/Conv", "output_conv"),
        ("decoder.transformer.blocks.1.cross_attn_token_to_image.q_proj/MatMul",
         "decoder.transformer.blocks.1.cross_attn_token_to_image"),
        ("decoder.transformer.final_iou.attn.q_proj/MatMul", "decoder.transformer.final_iou"),
        ("decoder.transformer.final.attn.q_proj/MatMul", "decoder.transformer.final"),
        ("decoder.mask_pred.3.layers.0/Gemm", "decoder.mask_pred.3"),
        ("decoder.sem_pred.layers.0/MatMul", "decoder.sem_pred"),
        ("upscaler.up1/MatMul", "upscaler"),
        ("MatMul_7", "MatMul_7"),
    ],
)  # fmt: skip
def test_blocks_are_prefixes_of_their_nodes(node, block):
    assert block_of(node) == block
    assert nodes_by_block([node]) == {block: (node,)}
    assert Exclusions(entries={IMAGE_ENCODER: (block,)}).keep(IMAGE_ENCODER, [node]) == ()


def test_exclusions_can_be_saved_edited_and_replayed(tmp_path):
    path = tmp_path / "exclusions.json"
    nodes = ["blocks.1.mlp.fc1/MatMul", "blocks.1.mlp.fc2/MatMul", "blocks.10.mlp.fc1/MatMul"]
    path.write_text(json.dumps({"note": 1, "exclude": {IMAGE_ENCODER: ["blocks.1.mlp.fc1"]}}))
    exclusions = Exclusions.load(path)
    assert exclusions.keep(IMAGE_ENCODER, nodes) == tuple(nodes[1:])
    assert exclusions.keep(TEXT_DECODER, nodes) == tuple(nodes)
    assert Exclusions(entries={IMAGE_ENCODER: ("blocks.1",)}).keep(IMAGE_ENCODER, nodes) == (
        nodes[2],
    )
    with pytest.raises(InputError, match=r"'blocks\.2' covers no quantizable node"):
        Exclusions(entries={IMAGE_ENCODER: ("blocks.2",)}).keep(IMAGE_ENCODER, nodes)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"exclude": []}', '{"exclude": {"image_encoder": 1}}']
)
def test_exclusions_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "exclusions.json"
    path.write_text(text)
    with pytest.raises(InputError, match="exclusions"):
        Exclusions.load(path)


def test_exclusions_of_an_unknown_graph_are_refused():
    with pytest.raises(InputError, match="'encoder'"):
        Exclusions(entries={"encoder": ("blocks.0",)})


def test_budget_use_is_that_of_the_scarcest():
    budget = AccuracyBudget.parse("miou=0.005, top1=0.01,tokens=0.02")
    assert budget == AccuracyBudget(mask_iou=0.005, concept_top1=0.01, caption_tokens=0.02)
    assert budget.use(agreement(0.995, 1, 1)) == pytest.approx(1)
    assert budget.use(agreement(0.999, 0.98, 1)) == pytest.approx(2)
    assert budget.use(agreement(0.999, None, 0.9)) == pytest.approx(5)
    assert budget.use(agreement(float("nan"))) == float("inf")
    assert AccuracyBudget.parse("tokens=0").use(agreement(0.1, 0.1, 1)) == 0
    assert AccuracyBudget.parse("tokens=0").use(agreement(tokens=0.999)) == float("inf")


@pytest.mark.parametrize("text", ["", "miou", "miou=x", "iou=0.1", "miou=0.1,miou=0.2", "top1=2"])
def test_wrong_budgets_are_refused(text):
    with pytest.raises(InputError, match="budget"):
        AccuracyBudget.parse(text)
