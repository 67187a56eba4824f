"""Many uploads: the server keeps the newest pictures, within its bound of memory."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.serve.attacks import Attack, require
from benchmarks.serve.clients import Clients, connected, tally
from benchmarks.serve.exam import Exam
from benchmarks.serve.memory import watched
from benchmarks.serve.target import ProcessState, Target

UPLOADERS = 4
ASKED = 5  # of the newest pictures

Upload = tuple[str, int]  # id, and index of the picture


def many_uploads(exam: Exam, count: int, kept: int) -> Attack:
    """Return an attack that uploads pictures and never deletes them.

    Args:
        exam: the pictures, in turn.
        count: number of uploads.
        kept: pictures that the server has room for.
    """

    async def attack(target: Target, before: ProcessState) -> dict[str, Any]:
        async with connected(target, exam) as uploader:
            async with watched(target) as memory:
                uploads = await _upload(uploader, exam, count)
            alive = {each for each, _ in uploads if await uploader.is_kept(each)}
            newest_alive = [upload for upload in uploads if upload[0] in alive][-ASKED:]
            replies = [await _ask(uploader, exam, upload) for upload in newest_alive]
        differences, growth = tally(replies), memory.growth()
        # The order of answers to several uploaders is not quite that of the server.
        newest = {each for each, _ in uploads[-kept - UPLOADERS :]}
        require(len(alive) == kept, f"{len(alive)} pictures are kept; expected {kept}")
        require(alive <= newest, "an old picture is kept, and a newer one is not")
        answered = differences.answers == min(ASKED, kept)
        require(answered, "a question about a new picture was not answered")
        require(not differences.wrong, f"answers on new pictures differ: {differences}")
        require(growth.is_flat, f"memory has grown by {100 * growth.share:.1f} %")
        return {"uploads": count, "kept": len(alive), "memory": growth.to_dict()}

    return attack


async def _upload(uploader: Clients, exam: Exam, count: int) -> list[Upload]:
    """Upload pictures with a few clients; return them in order of the answers."""
    turns, uploads = iter(range(count)), list[Upload]()

    async def client() -> None:
        for turn in turns:
            picture = turn % len(exam.pictures)
            uploads.append((await uploader.upload(exam.pictures[picture]), picture))

    await asyncio.gather(*(client() for _ in range(UPLOADERS)))
    return uploads


async def _ask(uploader: Clients, exam: Exam, upload: Upload) -> Any:
    image_id, picture = upload
    question = next(each for each in exam.questions if each.picture == picture)
    return await uploader.ask_about(image_id, question)
