"""The parity suite: every graph in every shape, and the properties that its users rely on.

It needs no other runtime: prompts, pictures and captions do not affect each other, so the golden
samples, which PyTorch made, are the expected outputs of any number of them. Only for the number of
points of a prompt, which changes its answer, another reference is needed.

All comparisons have the tolerances of the precision, also those of a graph with itself: for another
shape, a runtime may choose other kernels, which sum in another order, or round to other steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tap_deploy import graphs
from tap_deploy.bundle.golden import Golden, GoldenSample, GoldenText
from tap_deploy.config import PointLabel, TapConfig
from tap_deploy.image import model_image
from tap_deploy.masks import mask_rows, request_candidates, select_mask_token
from tap_deploy.sessions.caption_steps import step_inputs
from tap_deploy.sessions.contract import Session, to_float32, to_spec_dtypes
from tap_deploy.sessions.host_captioner import Captioner
from tap_deploy.verify.comparison import Comparison, Report, compare
from tap_deploy.verify.graph_check import within_limits
from tap_deploy.verify.prompt_outputs import decode_all_tokens
from tap_deploy.verify.recorder import ComparisonRecorder, choice_margins
from tap_deploy.verify.text_steps import run_text
from tap_deploy.verify.tolerances import CAPTION_IDS, MASK_INDEX, PROMPT_OUTPUTS, Tolerances

Decoded = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteSizes:
    """Sizes that the suite runs.

    Attributes:
        batches: numbers of pictures B.
        prompts: numbers of prompts P.
        points: numbers of points per prompt N.
        captions: numbers of captions P, each at every length of the cache.
        pictures: heights and widths of pictures, pixels.
    """

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    points: tuple[int, ...]
    captions: tuple[int, ...]
    pictures: tuple[tuple[int, int], ...]

    @property
    def most_checks(self) -> int:
        """Number of comparisons with a reference and without limits, for a progress bar."""
        prompts = 3 * len(self.prompts) + len(self.points) + 5
        text = 4 * len(self.captions) + 3
        return 2 + len(self.batches) + 5 * (prompts + len(self.pictures)) + 4 + text


FULL = SuiteSizes(
    batches=(1, 2, 3),
    prompts=(1, 2, 3, 5, 8, 16, 31, 64, 256),
    points=tuple(range(1, 17)),
    captions=(1, 2, 3, 5, 8, 16, 64, 256),
    pictures=((1, 1), (2, 500), (500, 3), (97, 101), (480, 640), (640, 480), (1080, 1920)),
)
SHORT = SuiteSizes(
    batches=(1, 2),
    prompts=(1, 3, 16),
    points=(1, 2, 9),
    captions=(1, 5),
    pictures=((3, 200), (480, 640)),
)


def run_suite(
    sessions: Mapping[str, Session],
    config: TapConfig,
    golden: Golden,
    *,
    sizes: SuiteSizes,
    backend: str,
    precision: str,
    tolerances: Tolerances,
    reference: Mapping[str, Session] | None = None,
    on_check: Callable[[Comparison], None] | None = None,
) -> Report:
    """Run all sizes and properties, and compare every output.

    Args:
        sessions: one session per graph name. Sizes beyond their limits are left out.
        config: sizes of the model.
        golden: the golden samples of the bundle.
        sizes: the sizes to run.
        backend: name for the report.
        precision: name for the report.
        tolerances: output name -> tolerance.
        reference: image encoder and prompt decoder of the reference, for prompts of any number of
            points and pictures of any size; None leaves them out.
        on_check: called with every comparison.

    Raises:
        SessionError: a graph fails to run.
    """
    golden = within_limits(sessions, golden)
    recorder = ComparisonRecorder(tolerances, on_check)
    _EncoderSuite(sessions[graphs.IMAGE_ENCODER], golden, recorder).run(sizes)
    prompts = _PromptSuite(sessions[graphs.PROMPT_DECODER], config, golden, recorder)
    prompts.run(sizes)
    if reference is not None:
        prompts.check_lengths(sizes, reference[graphs.PROMPT_DECODER])
        points = sessions[graphs.PROMPT_DECODER].limits.get("N", 2)
        for height, width in sizes.pictures if points >= 2 else ():
            _check_picture(sessions, reference, config, recorder, height, width)
    _TextSuite(sessions[graphs.TEXT_DECODER], config, golden, recorder).run(sizes)
    return Report(checks=tuple(recorder.checks), backend=backend, precision=precision)


class _EncoderSuite:
    """Pictures in batches, and one after the other."""

    def __init__(self, session: Session, golden: Golden, recorder: ComparisonRecorder) -> None:
        self.session, self.recorder = session, recorder
        self.sample = golden.samples[0]

    def run(self, sizes: SuiteSizes) -> None:
        one = self.sample.images[:1]
        pictures = [one, one[:, :, ::-1], one[:, ::-1]]  # the picture, mirrored, upside down
        pictures = [np.ascontiguousarray(picture) for picture in pictures]
        alone = [self._encode(picture) for picture in pictures]
        self._compare("first", alone[0], self.sample.image_embeddings[:1])
        self._compare("again after others", self._encode(one), alone[0])
        for size in _within(self.session, "B", sizes.batches):
            order = np.arange(size)[::-1] % len(pictures)
            batch = self._encode(np.concatenate([pictures[index] for index in order]))
            self._compare(f"B={size}", batch, np.concatenate([alone[index] for index in order]))

    def _encode(self, images: np.ndarray) -> np.ndarray:
        return to_float32(self.session.run({graphs.IMAGES: images}))[graphs.IMAGE_EMBEDDINGS]

    def _compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        self.recorder.add(graphs.IMAGE_ENCODER, graphs.IMAGE_EMBEDDINGS, name, actual, expected)


class _PromptSuite:
    """Prompts in any number, order and length."""

    def __init__(
        self, session: Session, config: TapConfig, golden: Golden, recorder: ComparisonRecorder
    ) -> None:
        self.session, self.config, self.recorder = session, config, recorder
        self.samples = golden.samples

    def run(self, sizes: SuiteSizes) -> None:
        for sample in self.samples:
            for count in _within(self.session, "P", sizes.prompts):
                self._check(f"P={count} N={sample.point_labels.shape[1]}", sample, count)
        first, *others = self.samples
        for other in others:  # what one call leaves behind must not reach the next
            self._check("other prompts", other, len(other.mask_index))
            self._check("first prompts again", first, len(first.mask_index))
        self._check_points_in_another_order(first)
        self._check_requests(first)

    def check_lengths(self, sizes: SuiteSizes, reference: Session) -> None:
        """Compare prompts of every number of points with those of another session."""
        sample = self.samples[0]
        for points in _within(self.session, "N", sizes.points):
            most = self.session.limits.get("P", 3)
            coords, labels = (array[:most] for array in _prompts_of_length(self.config, points))
            decoded = self._decode(self.session, sample, coords, labels)
            expected = self._decode(reference, sample, coords, labels)
            index = select_mask_token(expected[graphs.IOU_PREDICTIONS], labels)
            self._compare(f"P={len(labels)} N={points}, reference", decoded, expected, index)

    def _check(self, name: str, sample: GoldenSample, count: int) -> None:
        """Compare prompts of a sample, repeated in reverse order, with its outputs."""
        order = np.arange(count)[::-1] % len(sample.mask_index)
        coords, labels = sample.point_coords[order], sample.point_labels[order]
        decoded = self._decode(self.session, sample, coords, labels)
        expected = {name: getattr(sample, name)[order] for name in PROMPT_OUTPUTS}
        self._compare(name, decoded, expected, sample.mask_index[order])

    def _check_points_in_another_order(self, sample: GoldenSample) -> None:
        """Points after those that say what a prompt is may come in any order."""
        coords, labels = sample.point_coords.copy(), sample.point_labels.copy()
        coords[:, 2:], labels[:, 2:] = coords[:, :1:-1], labels[:, :1:-1]
        decoded = self._decode(self.session, sample, coords, labels)
        expected = {name: getattr(sample, name) for name in PROMPT_OUTPUTS}
        self._compare("points in another order", decoded, expected, sample.mask_index)

    def _check_requests(self, sample: GoldenSample) -> None:
        """Masks of some rows and tokens are those among all."""
        count, tokens = len(sample.mask_index), self.config.num_mask_tokens
        request = np.ascontiguousarray(request_candidates(count, tokens)[:, ::-1])
        rows = np.ascontiguousarray(mask_rows(count)[::2])
        inputs = {
            graphs.IMAGE_EMBEDDINGS: sample.image_embeddings[:1],
            graphs.POINT_COORDS: sample.point_coords,
            graphs.POINT_LABELS: sample.point_labels,
            graphs.MASK_REQUEST: request,
            graphs.MASK_ROWS: rows,
        }
        found = to_float32(self.session.run(to_spec_dtypes(self.session.spec, inputs)))
        wanted = {
            graphs.LOW_RES_MASKS: sample.low_res_masks[rows][:, ::-1],
            graphs.IOU_PREDICTIONS: sample.iou_predictions,
            graphs.SEMANTIC_TOKENS: sample.semantic_tokens[:, ::-1],
            graphs.SEMANTIC_EMBEDDINGS: sample.semantic_embeddings[:, ::-1],
        }
        for tensor, expected in wanted.items():
            name = "chosen rows and tokens"
            self.recorder.add(graphs.PROMPT_DECODER, tensor, name, found[tensor], expected)

    def _decode(
        self, session: Session, sample: GoldenSample, coords: np.ndarray, labels: np.ndarray
    ) -> Decoded:
        return decode_all_tokens(session, self.config, coords, labels, sample.image_embeddings)

    def _compare(
        self, name: str, decoded: Decoded, expected: Decoded, mask_index: np.ndarray
    ) -> None:
        graph = graphs.PROMPT_DECODER
        for tensor in PROMPT_OUTPUTS:
            self.recorder.add(graph, tensor, name, decoded[tensor], expected[tensor])
        iou, chosen = decoded[graphs.IOU_PREDICTIONS], decoded[graphs.MASK_INDEX]
        margins, scale = choice_margins(iou, chosen, mask_index), float(np.abs(iou).max())
        self.recorder.add_choice(graph, MASK_INDEX, name, chosen, mask_index, margins, scale)


class _TextSuite:
    """Captions in any number and order, greedy and drawn, at every length of the cache."""

    def __init__(
        self, session: Session, config: TapConfig, golden: Golden, recorder: ComparisonRecorder
    ) -> None:
        self.session, self.config, self.recorder = session, config, recorder
        self.text = golden.captions
        if golden.vocabulary is not None:
            self.text = GoldenText.concatenate([golden.captions, golden.vocabulary])

    def run(self, sizes: SuiteSizes) -> None:
        for count in _within(self.session, "P", sizes.captions):
            order = np.arange(count)[::-1] % len(self.text.input_ids)
            text = self.text.rows(order)
            for whole in (False, True):
                run = run_text(self.session, self.config, text, whole_cache=whole)
                name = f"P={count}{' whole cache' if whole else ''}"
                graph = graphs.TEXT_DECODER
                digests = run.logit_digests, text.logit_digests
                self.recorder.add(graph, graphs.LOGITS, name, *digests)
                self.recorder.add_choice(
                    graph, CAPTION_IDS, name, run.next_ids, text.next_ids, run.margins, run.scale
                )
        self._check_draws()

    def _check_draws(self) -> None:
        """Noise of 0 among all candidates is greedy; the same noise draws the same tokens."""
        tokens = self.text.semantic_tokens[: int(min(4, self.session.limits.get("P", 4)))]
        cache = np.zeros(graphs.kv_cache_shape(self.config, len(tokens), 1), np.float32)
        ids = np.zeros(len(tokens), np.int32)
        candidates = graphs.draw_candidates(self.config)
        for name, noise in (
            ("one candidate", None),
            ("all candidates, no noise", np.zeros((len(tokens), candidates), np.float32)),
        ):
            inputs = step_inputs(self.config, tokens, ids, 0, cache, noise)
            outputs = self.session.run(to_spec_dtypes(self.session.spec, inputs))
            logits = outputs[graphs.LOGITS].astype(np.float32)
            best = logits.argmax(axis=-1)
            chosen = outputs[graphs.NEXT_IDS].astype(np.int64)
            margins, scale = choice_margins(logits, chosen, best), float(np.abs(logits).max())
            self.recorder.add_choice(
                graphs.TEXT_DECODER, CAPTION_IDS, name, chosen, best, margins, scale
            )
        drawn = [
            Captioner(self.session, self.config).generate(
                tokens, temperature=1.0, rng=np.random.default_rng(0)
            )
            for _ in range(2)
        ]
        same = compare(graphs.TEXT_DECODER, CAPTION_IDS, "drawn twice", drawn[1], drawn[0], 0)
        self.recorder.record(same)


def _check_picture(
    sessions: Mapping[str, Session],
    reference: Mapping[str, Session],
    config: TapConfig,
    recorder: ComparisonRecorder,
    height: int,
    width: int,
) -> None:
    """Compare a picture and prompts in its pixels, each graph with the reference's own inputs."""
    rgb = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    images, frame = model_image(rgb, config.image_size)
    name = f"{height} x {width} pixels"
    found, expected = (
        to_float32(s[graphs.IMAGE_ENCODER].run({graphs.IMAGES: images}))[graphs.IMAGE_EMBEDDINGS]
        for s in (sessions, reference)
    )
    recorder.add(graphs.IMAGE_ENCODER, graphs.IMAGE_EMBEDDINGS, name, found, expected)
    corner = np.array([width, height], np.float32) * np.float32(frame.scale)
    coords = np.array([[[0.1, 0.2], [0.8, 0.9]], [[0.5, 0.5], [0, 0]]], np.float32) * corner
    labels = np.array(
        [
            [PointLabel.BOX_LEFT_TOP, PointLabel.BOX_RIGHT_BOTTOM],
            [PointLabel.FOREGROUND, PointLabel.PADDING],
        ],
        np.int32,
    )
    most = sessions[graphs.PROMPT_DECODER].limits.get("P", len(labels))
    coords, labels = coords[:most], labels[:most]
    decoded, wanted = (
        decode_all_tokens(s[graphs.PROMPT_DECODER], config, coords, labels, expected)
        for s in (sessions, reference)
    )
    for tensor in PROMPT_OUTPUTS:
        recorder.add(graphs.PROMPT_DECODER, tensor, name, decoded[tensor], wanted[tensor])


def _within(session: Session, axis: str, sizes: Sequence[int]) -> Iterator[int]:
    return (size for size in sizes if size <= session.limits.get(axis, size))


def _prompts_of_length(config: TapConfig, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return three prompts of N points: foreground and background, a box, and mostly padding."""
    rng = np.random.default_rng(points)
    coords = rng.uniform(0, config.image_size, (3, points, 2)).astype(np.float32)
    labels = rng.integers(PointLabel.BACKGROUND, PointLabel.FOREGROUND + 1, (3, points))
    if points >= 2:
        coords[1, :2] = np.sort(coords[1, :2], axis=0)
        labels[1, :2] = PointLabel.BOX_LEFT_TOP, PointLabel.BOX_RIGHT_BOTTOM
        coords[2, 1:], labels[2, 1:] = 0, PointLabel.PADDING
    return coords, labels.astype(np.int32)
