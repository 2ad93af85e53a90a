"""Typed tasks: handlers that can be called directly or submitted, with payloads and results that type checkers verify.

The decorator `Worker.task` creates a `TaskFunction`. To type checkers, its method ``submit`` accepts only payloads of
the annotated type. The result of a task is converted to the annotated return type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

import msgspec

from nqnb.client import Client, Task
from nqnb.errors import MalformedMessage
from nqnb.inputs import Duration
from nqnb.json_types import from_json
from nqnb.payload import encode_json
from nqnb.worker.handlers import result_type
from nqnb.worker.job import Job

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
P = TypeVar("P")
R = TypeVar("R")
S = TypeVar("S", covariant=True)


class TypedTask(Task, Generic[R]):
    """The handle of one task whose result has a known type. Awaiting the handle returns the result.

    Args:
        client: the client to use.
        task: the untyped handle of the task.
        kind: the type to which the result is converted, or Any for no conversion.

    Examples:
        >>> worker = nqnb.Worker()
        >>> @worker.task("half")
        ... def half(payload: int) -> float:
        ...     return payload / 2
        >>> async with worker:
        ...     task = await half.submit(nq, 3)
        ...     print(await task.result(timeout=30))
        1.5
    """

    def __init__(self, client: Client, task: Task, kind: Any) -> None:
        super().__init__(client, task.id, task.queue, attached=task.attached, span_context=task.span_context)
        self._kind = kind

    def __await__(self) -> Generator[Any, None, R]:
        return self.result().__await__()

    async def result(self, timeout: Duration | None = None) -> R:
        """Wait until the task has ended, and return its result.

        Args:
            timeout: how long to wait, in seconds or as a timedelta. 0 checks without waiting, and None waits without a
                limit.

        Raises:
            MalformedMessage: the result does not match the function's return annotation. This happens, for example, if
                an older version of the function returned the result.
            TaskFailed, TaskCancelled, WaitTimeout, BadInput: see `nqnb.Task.result`.
        """
        value = await super().result(timeout)
        if isinstance(value, bytes) or self._kind is Any:
            return value  # type: ignore[no-any-return]  # the handler's annotation is trusted
        try:
            converted: R = msgspec.convert(value, self._kind, str_keys=True, dec_hook=from_json)
        except msgspec.ValidationError as error:
            raise MalformedMessage(
                f"the result of task {self.id!r} does not match the return annotation of the handler: {error}. "
                "Correct the annotation, or read the stored value with `nqnb.Client.result`.",
                encode_json(value),
            ) from None
        return converted


class Submitter(Protocol[S]):
    """An object such as a session, whose method ``submit`` returns a task without being awaited."""

    @property
    def submit(self) -> Callable[..., S]:
        """The method that submits a task; see `nqnb.Client.submit`."""
        ...


class TaskFunction(Generic[Arguments, Returned, P, R]):
    """A handler that can be called directly, for example in a test. `submit` submits a task to the handler's queue.

    Args:
        queue: the name of the queue.
        function: the decorated function.

    Examples:
        >>> worker = nqnb.Worker()
        >>> @worker.task("double")
        ... def double(payload: int) -> int:
        ...     return 2 * payload
        >>> double(21)
        42
        >>> async with worker:
        ...     print(await (await double.submit(nq, 21)))
        42

        With a session: ``double.submit(nqnb.session(), 21).result(30)``.
    """

    def __init__(self, queue: str, function: Callable[Arguments, Returned]) -> None:
        # This copies the function's attributes, so set our attributes later: the names may be the same.
        functools.update_wrapper(self, function)
        self.queue = queue
        self._function = function
        self._kind = result_type(function)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        """Call the function directly, without a server."""
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {getattr(self._function, '__qualname__', self._function)} of queue {self.queue}>"

    @overload
    def submit(self, nq: Client, payload: P, **options: Any) -> Coroutine[Any, Any, TypedTask[R]]: ...
    @overload
    def submit(self, nq: Submitter[S], payload: P, **options: Any) -> S: ...
    def submit(self, nq: Client | Submitter[Any], payload: P, **options: Any) -> Any:
        """Submit a task with the payload, and return its handle. With a client, the call must be awaited.

        Args:
            nq: the client, or a session from `nqnb.session`. The result of a task that is submitted through a session
                is decoded JSON, without conversion to the annotated type.
            payload: the payload, of the annotated type.
            **options: options of `nqnb.Client.submit`, such as ``retry`` and ``timeout``.

        Raises:
            NqnbError: see `nqnb.Client.submit`.
        """
        if isinstance(nq, Client):
            return self._submit(nq, payload, options)
        return nq.submit(self.queue, payload, **options)

    async def _submit(self, nq: Client, payload: P, options: dict[str, Any]) -> TypedTask[R]:
        return TypedTask(nq, await nq.submit(self.queue, payload, **options), self._kind)


class Register(Protocol):
    """The decorator that `nqnb.Worker.task` returns."""

    @overload
    def __call__(
        self, function: Callable[[Job, P], Coroutine[Any, Any, R]], /
    ) -> TaskFunction[[Job, P], Coroutine[Any, Any, R], P, R]: ...
    @overload
    def __call__(self, function: Callable[[Job, P], R], /) -> TaskFunction[[Job, P], R, P, R]: ...
    @overload
    def __call__(
        self, function: Callable[[P], Coroutine[Any, Any, R]], /
    ) -> TaskFunction[[P], Coroutine[Any, Any, R], P, R]: ...
    @overload
    def __call__(self, function: Callable[[P], R], /) -> TaskFunction[[P], R, P, R]: ...
    def __call__(self, function: Callable[..., Any], /) -> Any:
        """Register the function as the handler of the queue, and return it as a `TaskFunction`."""
