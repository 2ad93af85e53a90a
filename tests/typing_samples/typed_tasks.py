"""Uses of typed tasks and of the client. A type checker must report the lines marked ``# wrong``, and no others."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import assert_type

import nqnb

worker = nqnb.Worker()


@dataclass
class Resize:
    path: str
    width: int = 800


@worker.task("resize")
def resize(job: nqnb.Job, payload: Resize) -> str:
    return payload.path


@worker.task("double")
async def double(payload: int) -> int:
    return 2 * payload


async def submit(nq: nqnb.Client) -> None:
    task = await resize.submit(nq, Resize("a.png"))
    assert_type(await task, str)
    assert_type(await task.result(30), str)
    assert_type(await (await double.submit(nq, 21)), int)
    await resize.submit(nq, {"path": "a.png"})  # wrong: not the annotated type
    await resize.submit(nq, Resize(5))  # wrong: the path is text
    await double.submit(nq, "21")  # wrong: not a number
    await double.submit(nq)  # wrong: no payload
    number: int = await task  # wrong: the result is text
    print(number)


async def call(job: nqnb.Job) -> None:
    assert_type(resize(job, Resize("a.png")), str)
    assert_type(await double(4), int)
    resize(job, "a.png")  # wrong: not the annotated type
    await double("4")  # wrong: not a number
    text: str = await double(4)  # wrong: the result is a number
    print(text)


async def listing(nq: nqnb.Client) -> None:
    tasks = await nq.submit_many("resize", [1, 2])
    assert_type(tasks, list[nqnb.Task])
    assert_type(await tasks[0].cancel(), nqnb.CancelReceipt)
    assert_type(await nq.tasks("resize"), list[nqnb.TaskInfo])
    await nq.tasks(5)  # wrong: a queue is text
    nq.submit("resize", urgent=True)  # wrong: there is no such argument
