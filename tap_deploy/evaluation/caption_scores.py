"""CIDEr-D, METEOR and BLEU of captions by pycocoevalcap, on words of the PTB tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from tap_deploy.errors import first_line
from tap_deploy.evaluation.modules import eval_module
from tap_deploy.evaluation.words import words

logger = logging.getLogger(__name__)

CAPTION_METRICS = ("CIDEr", "METEOR", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
PTB, OWN = "PTB tokenizer (Java)", "tap_deploy (without Java)"
_PERCENT = 100.0
_PTB_CLASS = "edu.stanford.nlp.process.PTBTokenizer"


def caption_scores(
    found: Sequence[str], true: Sequence[str]
) -> tuple[dict[str, float | None], str]:
    """Return ``CAPTION_METRICS`` of captions, and what split them into words, ``PTB`` or ``OWN``.

    Args:
        found: a caption per region.
        true: its true caption.

    Returns:
        The metrics times 100 as in papers, METEOR None without Java; and the name.

    Raises:
        MissingDependencyError: pycocoevalcap is not installed.
    """
    cider = eval_module("pycocoevalcap.cider.cider")
    bleu = eval_module("pycocoevalcap.bleu.bleu")
    split, words_by = tokenized([*found, *true])
    candidates = {index: [text] for index, text in enumerate(split[: len(found)])}
    references = {index: [text] for index, text in enumerate(split[len(found) :])}
    scores: dict[str, float | None] = {
        "CIDEr": _PERCENT * float(cider.Cider().compute_score(references, candidates)[0]),
        "METEOR": _meteor(references, candidates),
    }
    bleus, _ = bleu.Bleu().compute_score(references, candidates, verbose=0)
    scores |= {f"BLEU-{n}": _PERCENT * value for n, value in enumerate(bleus, 1)}
    return scores, words_by


def tokenized(captions: Sequence[str]) -> tuple[list[str], str]:
    """Return captions as words in lower case, without punctuation, separated by spaces.

    The Java program of pycocoevalcap splits them; without Java, or if it fails, ``words`` does,
    which was compared with it. The second value says which: ``PTB`` or ``OWN``.

    Raises:
        MissingDependencyError: pycocoevalcap is not installed.
    """
    ptb = eval_module("pycocoevalcap.tokenizer.ptbtokenizer")
    lines = [" ".join(caption.split()) for caption in captions]  # a caption a line
    if shutil.which("java") is None:
        logger.info(
            "no Java on this machine: captions are split without the PTB tokenizer, and METEOR is "
            "left out; apt-get install default-jre-headless adds both"
        )
        return [" ".join(words(line)) for line in lines], OWN
    jar = pathlib.Path(str(ptb.__file__)).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), _PTB_CLASS]
    ran = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
    )
    split = ran.stdout.splitlines()
    if ran.returncode or len(split) != len(lines):
        logger.warning(
            "the PTB tokenizer failed (exit code %d, %d of %d captions); captions are split "
            "without it: %s",
            ran.returncode,
            len(split),
            len(lines),
            first_line(RuntimeError(ran.stderr)),
        )
        return [" ".join(words(line)) for line in lines], OWN
    dropped = set(ptb.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in split], PTB


def _meteor(references: dict[int, list[str]], candidates: dict[int, list[str]]) -> float | None:
    """Return METEOR times 100; None without Java or its program."""
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap.meteor") is None:
        return None
    module = eval_module("pycocoevalcap.meteor.meteor")
    if not pathlib.Path(str(module.__file__)).with_name(module.METEOR_JAR).is_file():
        logger.info("METEOR is left out: pycocoevalcap was installed without %s", module.METEOR_JAR)
        return None
    try:
        with _running(module.Meteor()) as meteor:
            return _PERCENT * float(meteor.compute_score(references, candidates)[0])
    except (OSError, ValueError) as exc:  # Java ended: it gets 2 GB of memory
        logger.warning("METEOR is left out, its Java program failed: %s", first_line(exc))
        return None


@contextlib.contextmanager
def _running(meteor: Any) -> Iterator[Any]:
    """Yield the scorer, and end its Java program."""
    try:
        yield meteor
    finally:
        if meteor.lock.locked():  # after an error; its destructor would wait for it
            meteor.lock.release()
        for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            pipe.close()
        with contextlib.suppress(OSError):
            meteor.meteor_p.stdin.close()
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
