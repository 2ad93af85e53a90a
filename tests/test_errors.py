"""The tree of errors, and that no error of nats-py escapes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import sys
import traceback
from collections.abc import Awaitable, Iterator
from typing import Any

import nats.errors
import nats.js.errors
import pytest

import nqnb
from nqnb import errors
from nqnb.errors import ConnectionFailed, JobCancelled, NqnbError
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import FastClient

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, BaseException) and kind.__module__ == "nqnb.errors"
}


def drawn_tree() -> Iterator[tuple[str, str, str]]:
    """Yield (name, name of the parent, description) for each line of the tree in the docstring."""
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.fullmatch(r"    ((?:│   |    )*(?:[├└]── )?)(\w+)(?:\s{2,}(.*))?", line)
        if drawn is None:
            continue
        depth = len(drawn[1]) // 4
        above[depth:] = [drawn[2]]
        yield drawn[2], above[depth - 1] if depth else "", drawn[3] or ""


def test_a_failed_task_prints_the_traceback_of_its_handler_as_a_note() -> None:
    trace = 'Traceback (most recent call last):\n  File "job.py", line 3, in resize\n    bad(\x1b[2J)\nValueError: no\n'
    error = nqnb.TaskFailed("task 'a' failed: ValueError: no", "a", None, "ValueError", trace)
    (note,) = error.__notes__
    assert note == (
        "\nThe handler's traceback (most recent call last):\n"
        '  File "job.py", line 3, in resize\n    bad(\\x1b[2J)\nValueError: no'
    )
    printed = "".join(traceback.format_exception(error))
    # The package exceptiongroup, which some tests load, prints notes in Python 3.10 too.
    assert printed.endswith(f"{error}\n{note}\n") or (sys.version_info < (3, 11) and printed.endswith(f"{error}\n"))
    assert error.traceback == trace
    for nothing in (None, "", " \n"):
        assert not hasattr(nqnb.TaskFailed("lost", "a", traceback=nothing), "__notes__")


class TestTree:
    def test_the_docstring_has_the_tree_of_errors(self) -> None:
        drawn = {name: parent for name, parent, _ in drawn_tree()}
        real = {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items() if kind is not JobCancelled}
        assert drawn == {**real, "NqnbError": ""}

    def test_each_error_has_the_builtin_base_that_the_docstring_names(self) -> None:
        said = {name: re.findall(r"also an? (\w+)", text) for name, _, text in drawn_tree()}
        for name, builtins in said.items():
            others = [base.__name__ for base in CLASSES[name].__bases__[1:]]
            assert others == builtins, name

    def test_each_error_has_the_attributes_that_the_docstring_names(self) -> None:
        for name, _, text in drawn_tree():
            for attribute in re.findall(r"``\.(\w+)``", text):
                assert attribute in inspect.signature(CLASSES[name]).parameters, name

    def test_job_cancelled_passes_an_except_exception(self) -> None:
        assert JobCancelled.__bases__ == (BaseException,)
        with pytest.raises(JobCancelled), contextlib.suppress(Exception):
            raise JobCancelled

    @pytest.mark.parametrize("name", CLASSES)
    def test_each_is_public(self, name: str) -> None:
        assert name in nqnb.__all__
        assert getattr(nqnb, name) is CLASSES[name]

    @pytest.mark.parametrize("name", CLASSES)
    def test_each_has_a_sentence(self, name: str) -> None:
        description, *_ = re.split(r"\n    [\w ]+:\n", str(CLASSES[name].__doc__))
        assert description.rstrip().endswith(".")


NATS_ERRORS = [
    kind
    for module in (nats.errors, nats.js.errors)
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, BaseException) and kind.__module__ == module.__name__
]
SENDING_ERRORS = [kind for kind in NATS_ERRORS if kind is not nats.errors.MaxPayloadError]


def made(kind: type[BaseException]) -> BaseException:
    """Return an error of that class; each of its arguments is 1."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return kind(*(1 for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD))


class Broken(FastClient):
    """A real client that fails in every way that nats-py has."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def publish(self, *args: Any, **options: Any) -> None:
        raise self.error

    async def subscribe(self, *args: Any, **options: Any) -> Any:
        raise self.error

    @property
    def max_payload(self) -> int:
        return 1_000_000


@pytest.mark.anyio
class TestTranslation:
    def test_every_error_of_nats_py_is_known(self) -> None:
        assert len(NATS_ERRORS) >= 30
        assert all(issubclass(kind, nats.errors.Error) for kind in NATS_ERRORS)

    async def test_a_message_that_is_too_large_has_an_error_of_its_own(self) -> None:
        connection = Connection(Broken(nats.errors.MaxPayloadError()), nqnb.Settings("nats://h:1"))
        with pytest.raises(nqnb.PayloadTooLarge, match="1,000,000"):
            await connection.send("a", b"x")

    @pytest.mark.parametrize("kind", SENDING_ERRORS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
    async def test_no_error_of_nats_py_escapes_the_connection(self, kind: type[BaseException]) -> None:
        connection = Connection(Broken(made(kind)), nqnb.Settings("nats://ann:s3cret@h:1"))
        calls = [
            connection.send("a"),
            connection.request("a"),
            connection.publish("a", b""),
            connection.api("INFO"),
            connection.subscribe("a", lambda message: None),
        ]
        for call in calls:
            with pytest.raises(NqnbError) as caught:
                await call
            assert isinstance(caught.value, ConnectionFailed)
            assert "nats://h:1" in str(caught.value)
            assert "s3cret" not in str(caught.value)

    async def test_pending_calls_of_a_closed_client_end_with_an_error_of_nqnb(self, nq: nqnb.Client) -> None:
        task = await nq.submit("idle")
        calls: list[Awaitable[object]] = [task.wait(), task.result(), *(nq.submit("idle", n) for n in range(20))]
        waiting = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.002)
        await nq.close()
        done, pending = await asyncio.wait(waiting, timeout=30)
        assert not pending
        failures = [each.exception() for each in done if each.exception() is not None]
        assert failures
        assert [each for each in failures if not isinstance(each, NqnbError)] == []

    async def test_a_listing_interrupted_by_a_dead_server_ends_with_an_error_of_nqnb(
        self, server: nqnb.DevServer
    ) -> None:
        nq = await nqnb.connect(server.url, request_timeout=0.5)
        await nq.submit_many("idle", range(1100))
        entries = nq.backend.states.entries()
        await anext(entries)

        async def read_on() -> None:
            async for _ in entries:
                pass

        server.kill()
        # The listing yields the rest of its page at once, and then waits for the next page.
        reading = asyncio.ensure_future(read_on())
        await asyncio.sleep(0)
        await nq.close()
        with pytest.raises(NqnbError):
            await asyncio.wait_for(reading, 30)

    async def test_after_the_servers_death_every_call_ends_with_an_error_of_nqnb(self, server: nqnb.DevServer) -> None:
        settings = nqnb.Settings(server.url, request_timeout=0.2, retry_for=0.3)
        async with nqnb.connect(settings) as nq:
            task = await nq.submit("idle")
            server.kill()
            calls = [
                *(task.fetch(), task.status(), task.cancel(), task.wait(1), task.result(1)),
                *(nq.submit("idle"), nq.submit("idle", id="mine"), nq.submit("fresh"), nq.submit_many("idle", [1, 2])),
                *(nq.tasks(), nq.queues(), nq.workers()),
            ]
            results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
            assert [each for each in results if not isinstance(each, NqnbError)] == []

    async def test_a_closed_client_says_what_to_do(self, settings: nqnb.Settings) -> None:
        nq = nqnb.connect(settings)
        for call in (nq.tasks(), nq.submit("q"), nq.fetch("a"), nq.cancel("a"), nq.queues()):
            with pytest.raises(ConnectionFailed, match=r"Open it with `async with nqnb\.connect\(…\) as nq`"):
                await call
