"""The decode loop, on a fake step graph whose tokens are known."""

from __future__ import annotations

import numpy as np
import pytest

from tap_deploy import graphs
from tap_deploy.config import BOS_ID, EOS_ID, TapConfig
from tap_deploy.sessions.caption_writer import blank_after_eos, draw_noise
from tap_deploy.sessions.fake import FakeSession
from tap_deploy.sessions.host_captioner import Captioner

CONFIG = TapConfig(
    image_size=64,
    window_size=4,
    encoder_depth=4,
    encoder_dim=8,
    encoder_heads=2,
    image_embed_dim=32,
    text_depth=1,
    text_dim=64,
    text_seq_len=10,
    vocab_size=50,
)
SPEC = graphs.graph_specs(CONFIG)[graphs.TEXT_DECODER]


class CountingStep:
    """Region r (identified by its semantic token) generates 10 + r until it ends with EOS.

    It also checks the cache: slot t must contain t + 1 in every row.
    """

    def __init__(self, lengths):
        self.lengths = lengths
        self.rows_per_step = []

    def __call__(self, inputs):
        position = int(inputs[graphs.POSITION][0])
        regions = inputs[graphs.SEMANTIC_TOKENS][:, 0].astype(int)
        self.rows_per_step.append(len(regions))
        for name in graphs.past_names(CONFIG):
            past = inputs[name]
            assert position <= past.shape[2] <= CONFIG.text_seq_len
            expected = np.arange(1, position + 1) + 100 * regions[:, None]
            np.testing.assert_array_equal(past[:, 0, :position, 0], expected)
        generated = position - 1  # tokens written before this step
        ids = np.where(np.array(self.lengths)[regions] <= generated, EOS_ID, 10 + regions)
        logits = np.zeros((len(regions), CONFIG.vocab_size), np.float32)
        logits[np.arange(len(regions)), ids] = 50
        slot = np.zeros((1, 2, len(regions), 1, 64), np.float32)
        slot += (position + 1 + 100 * regions)[:, None, None]
        best = np.argsort(-logits, axis=1, kind="stable")[:, : inputs[graphs.GUMBEL_NOISE].shape[1]]
        scores = np.take_along_axis(logits, best, axis=1) + inputs[graphs.GUMBEL_NOISE]
        drawn = np.take_along_axis(best, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
        return {
            graphs.NEXT_IDS: drawn.astype(np.int32),
            graphs.LOGITS: logits,
            graphs.PRESENT_KEY_VALUES: slot,
        }


def tokens(count):
    array = np.zeros((count, CONFIG.image_embed_dim), np.float32)
    array[:, 0] = np.arange(count)
    return array


def run(lengths, **options):
    step = CountingStep(lengths)
    ids = Captioner(FakeSession(SPEC, step), CONFIG).generate(tokens(len(lengths)), **options)
    return ids, step


def test_captions_end_with_eos_and_padding():
    ids, _ = run([2, 0, 5])
    assert ids.shape == (3, CONFIG.text_seq_len - 1)
    assert ids.dtype == np.int64
    pad = CONFIG.pad_id
    assert ids[0].tolist() == [BOS_ID, 10, 10, EOS_ID, *[pad] * 5]
    assert ids[1].tolist() == [BOS_ID, EOS_ID, *[pad] * 7]
    assert ids[2].tolist() == [BOS_ID, 12, 12, 12, 12, 12, EOS_ID, pad, pad]


def test_loop_ends_when_all_rows_have():
    _, step = run([1, 2, 2])
    assert len(step.rows_per_step) == 1 + 3  # prefix, two tokens, EOS


def test_finished_rows_are_dropped_once_half_are_idle():
    ids, step = run([0, 1, 1, 1, 7, 7, 7, 7])
    assert step.rows_per_step == [8, 8, 8, 4, 4, 4, 4, 4, 4]
    assert ids[4].tolist() == [BOS_ID, *[14] * 7, EOS_ID]
    assert ids[3].tolist()[:4] == [BOS_ID, 13, EOS_ID, CONFIG.pad_id]


def test_longest_caption_fills_the_row():
    ids, step = run([99])
    assert ids[0].tolist() == [BOS_ID, *[10] * CONFIG.max_new_tokens]
    assert len(step.rows_per_step) == 1 + CONFIG.max_new_tokens


@pytest.mark.parametrize("count", [0, 3, 8, 1000])
def test_max_new_tokens(count):
    ids, _ = run([99], max_new_tokens=count)
    written = min(count, CONFIG.max_new_tokens)
    assert (ids[0] == 10).sum() == written


def test_no_regions():
    ids, step = run([])
    assert ids.shape == (0, CONFIG.text_seq_len - 1)
    assert step.rows_per_step == []


def test_draws_use_the_logits_and_the_generator():
    ids, _ = run([2], temperature=1.0, rng=np.random.default_rng(0))
    assert ids[0].tolist()[:4] == [BOS_ID, 10, 10, EOS_ID]  # 50 apart: a draw cannot miss
    hot = [
        run([9], temperature=1e3, rng=np.random.default_rng(seed))[0].tolist() for seed in (0, 0, 1)
    ]
    assert hot[0] == hot[1] != hot[2]


def test_noise_makes_draws_from_the_softmax():
    logits = np.log(np.array([0.7, 0.2, 0.1]))
    for temperature, expected in ((1.0, [0.7, 0.2, 0.1]), (0.25, [0.993, 0.007, 0.0])):
        noise = draw_noise(CONFIG, 1, 20000, temperature, np.random.default_rng(0))
        assert noise.shape == (1, 20000, CONFIG.vocab_size)
        drawn = (logits + noise[0, :, :3]).argmax(axis=1)
        frequencies = np.bincount(drawn, minlength=3) / len(drawn)
        np.testing.assert_allclose(frequencies, expected, atol=0.015)


def test_noise_of_the_hottest_draw_fits_into_fp16():
    noise = draw_noise(CONFIG, 38, 64, 3e38, np.random.default_rng(0))
    assert np.isfinite(noise.astype(np.float16)).all()
    assert draw_noise(CONFIG, 38, 64, 0.0, None) is None


def test_a_draw_does_not_depend_on_which_others_have_finished():
    lengths = [9, 0, 1, 9]
    options = {"temperature": 1e3}
    all_rows, _ = run(lengths, rng=np.random.default_rng(0), **options)
    again, _ = run([9, 9, 9, 9], rng=np.random.default_rng(0), **options)
    np.testing.assert_array_equal(all_rows[[0, 3]], again[[0, 3]])


def test_blank_after_eos():
    ids = np.array([[1, 5, 2, 7, 2], [1, 5, 6, 7, 8]])
    assert blank_after_eos(ids, 49).tolist() == [[1, 5, 2, 49, 49], [1, 5, 6, 7, 8]]
