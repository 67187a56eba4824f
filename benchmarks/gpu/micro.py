"""Makes the micro bundle of the tests: concepts, a tokenizer, and every precision."""

from __future__ import annotations

import io
import json
import pathlib
import tempfile

import numpy as np

from tap_deploy.bundle.bundle import Bundle
from tap_deploy.bundle.manifest import CheckpointRecord
from tap_deploy.concepts import Vocabulary
from tap_deploy.config import TapConfig
from tap_deploy.storage.files import sha256_of_file

SEED = 0


def make_micro(data: pathlib.Path, output: pathlib.Path) -> Bundle:
    """Export the model whose outputs are stored in ``tests/data``, in fp32, fp16 and int8.

    Args:
        data: ``tests/data`` of the checkout.
        output: the folder to write.
    """
    from tap_deploy.engines.fp16.convert import add_fp16
    from tap_deploy.engines.int8.make import make_int8
    from tap_deploy.engines.int8.options import Int8Options, QuantizeOptions
    from tap_deploy.engines.smoothing.smoothed_variant import OFF
    from tap_deploy.export.bundle_export import export_bundle
    from tap_deploy.reference.synthetic import synthetic_model

    values = json.loads((data / "tap_micro.json").read_text("utf-8"))
    config = TapConfig.from_dict(values["config"])
    model = synthetic_model(config, SEED)
    with tempfile.TemporaryDirectory() as name:
        concepts, tokenizer = _concepts(data, pathlib.Path(name)), pathlib.Path(name, "tokenizer")
        tokenizer.write_bytes(trained_tokenizer(config.vocab_size))
        digest = sha256_of_file(data / "tap_micro.json")
        record = CheckpointRecord(
            file=f"synthetic, seed {SEED}",
            sha256=digest,
            md5="0" * 32,
            known_as=None,
            synthetic=True,
        )
        bundle = export_bundle(
            model,
            output,
            name="tap_micro",
            checkpoint=record,
            concepts=concepts,
            tokenizer=tokenizer,
        ).bundle
    add_fp16(bundle)
    # One picture is enough: the steps test whether a GPU runs the graphs, not their accuracy.
    options = Int8Options(
        quantize=QuantizeOptions(calibration_data=data / "coffee.jpg", samples=1),
        smoothquant=OFF,
        verdict=None,
    )
    make_int8(Bundle.open(output), options)
    return Bundle.open(output)


def _concepts(data: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    with np.load(data / "tap_micro_outputs.npz") as golden:
        names = tuple(golden["concept_vocabulary"].tolist())
        Vocabulary(weights=golden["concept_weights"], names=names).save(folder / "concepts.npz")
    return folder / "concepts.npz"


def trained_tokenizer(vocab_size: int) -> bytes:
    """Return a SentencePiece model trained on random words with a fixed seed."""
    import sentencepiece

    model = io.BytesIO()
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrst"), 5)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choice(words, 8)) for _ in range(800)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
