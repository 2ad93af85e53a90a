"""Handlers (functions that process the tasks of a queue), and the validation of their signatures and options."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import msgspec

from nqnb import json_types, payload
from nqnb.error_text import exact_text, kind_of, shown
from nqnb.errors import BadInput, InvalidHandler
from nqnb.inputs import Duration, check_count, check_seconds, signature_of
from nqnb.protocol import names
from nqnb.retry import Backoff
from nqnb.worker.job import Job

Isolation = Literal["coroutine", "thread", "process"]
"""The place where a handler runs: the worker's event loop, a separate thread, or a separate process."""
MOST_REUSE = 1_000_000
"""The maximum value of ``reuse``."""
MOST_TASKS_AT_ONCE = 1_000_000
"""The maximum value of ``concurrency``. In practice, a consumer delivers at most 65,536 messages at once."""


@dataclass(frozen=True)
class Handler:
    """A handler function, and the options that were passed to `Worker.handler`."""

    queue: str
    function: Callable[..., Any]
    is_coroutine: bool
    takes_payload: bool
    payload_type: Any
    backoff: Backoff
    grace: float
    isolation: Isolation
    is_failure: Callable[[Exception], bool] | None = None
    concurrency: int = MOST_TASKS_AT_ONCE
    progress_raises: bool = True
    reuse: int = 1
    """The maximum number of tasks that one process runs."""

    def call(self, job: Job) -> Callable[[], Any]:
        """Return a callable without parameters that calls the function with the arguments for the job.

        Raises:
            BadInput: the payload does not match the function's annotation.
        """
        return functools.partial(self.function, job, *self.arguments(job))

    def arguments(self, job: Job) -> tuple[Any, ...]:
        """Return the arguments that follow the job: the payload, or nothing if the function takes only the job.

        Raises:
            BadInput: the payload does not match the function's annotation.
        """
        if not self.takes_payload:
            return ()
        if self.payload_type is bytes:
            return (job.payload,)
        try:
            return (payload.decode_json(job.payload, self.payload_type),)
        except BadInput as error:
            raise BadInput(
                f"the payload does not match the annotation of {self.name}: {error}. "
                "Submit a payload of the annotated type."
            ) from None

    @property
    def name(self) -> str:
        """The qualified name of the function."""
        return _name_of(self.function)


def check_concurrency(concurrency: object, refusal: type[BadInput] = BadInput) -> int:
    """Validate and return a value for the ``concurrency`` option.

    Args:
        concurrency: the value.
        refusal: the class of the error to raise: `BadInput` or a subclass.

    Raises:
        BadInput: the value is not an integer from 1 to `MOST_TASKS_AT_ONCE`.
    """
    return check_count("concurrency", concurrency, 1, MOST_TASKS_AT_ONCE, "the number of tasks to run at once", refusal)


def check_decorated(queue: object, decorator: str) -> str:
    """Validate and return the queue name that was passed to a decorator.

    Args:
        queue: the queue name, or the decorated function if the decorator was used without parentheses.
        decorator: the decorator as written in code, such as ``@worker.handler``, for the error message.

    Raises:
        InvalidHandler: ``queue`` is a function.
        InvalidQueueName: the queue name is invalid.
    """
    if callable(queue) and not isinstance(queue, str):
        raise InvalidHandler(
            f'cannot register {_name_of(queue)}: {decorator} was used without a queue name. Write {decorator}("QUEUE").'
        )
    return names.check_queue(queue)


class PayloadFunction:
    """A wrapper with the parameters ``(job, payload)`` for a function that takes only ``(payload)``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__qualname__ = _name_of(function)

    def __call__(self, job: Job, payload: Any) -> Any:
        """Call the function with the payload, without the job."""
        return self.function(payload)

    def __repr__(self) -> str:
        return repr(self.function)


def make_handler(
    queue: str,
    function: Callable[..., Any],
    *,
    backoff: Backoff | None = None,
    grace: Duration = 1.0,
    isolation: Isolation | None = None,
    is_failure: Callable[[Exception], bool] | None = None,
    concurrency: int | None = None,
    progress_raises: bool = True,
    reuse: int | None = None,
) -> Handler:
    """Build a handler from a function and the options of `Worker.handler`.

    Raises:
        InvalidQueueName: the queue name is invalid.
        InvalidHandler: the function's parameters are not ``(job)``, ``(payload)`` or ``(job, payload)``, or an option
            is invalid.
    """
    queue = names.check_queue(queue)
    if not callable(function):
        raise InvalidHandler(
            f"{shown(function)} cannot handle tasks: it is not callable. "
            "Use a function whose parameters are (job), (payload) or (job, payload)."
        )
    name = _name_of(function)
    seconds = check_seconds("grace", grace, positive=True, refusal=InvalidHandler)
    if backoff is not None and not isinstance(backoff, Backoff):
        raise InvalidHandler(
            f"backoff={shown(backoff)} is invalid for {name}: expected a Backoff, got {kind_of(backoff)}. "
            "Use Backoff(first, most): the first delay and the longest delay, in seconds."
        )
    if is_failure is not None and not callable(is_failure):
        raise InvalidHandler(
            f"is_failure={shown(is_failure)} is invalid for {name}: the value is not callable. "
            "Use a function with one parameter, the exception."
        )
    try:
        generates = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        signature = signature_of(function)
        target = inspect.unwrap(function)
        is_coroutine = any(
            inspect.iscoroutinefunction(part) for part in (function, target, vars(type(target)).get("__call__"))
        )
    except Exception:  # noqa: BLE001  a user's object may raise anything
        raise InvalidHandler(
            f"{name} cannot handle tasks: its signature cannot be inspected. "
            "Register a function with one parameter, such as `def handler(job)`."
        ) from None
    if generates:
        raise InvalidHandler(
            f"{name} cannot handle tasks: it is a generator function. Return the result instead of yielding it."
        )
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.kind in positional]
    required = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty and parameter.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)
    ]
    if not parameters or len(required) > 2 or any(parameter.kind is parameter.KEYWORD_ONLY for parameter in required):
        raise InvalidHandler(
            f"{name}{signature} cannot handle tasks: its parameters must be (job), (payload) or (job, payload)."
        )
    where = _check_isolation(isolation, name, is_coroutine=is_coroutine)
    takes_both = len(parameters) > 1 and (len(required) > 1 or parameters[1].default is inspect.Parameter.empty)
    first_is_payload = _is_payload(target, parameters[0].name)
    if takes_both and first_is_payload:
        raise InvalidHandler(
            f"{name}{signature} cannot handle tasks: the first of two parameters receives the Job, but the name or "
            "annotation of this parameter describes a payload. Use the parameters (job, payload), or put all "
            "values into one payload."
        )
    takes_one = not takes_both and first_is_payload
    return Handler(
        queue=queue,
        function=PayloadFunction(function) if takes_one else function,
        is_coroutine=is_coroutine,
        takes_payload=takes_both or takes_one,
        payload_type=_payload_type(target, parameters[takes_both].name) if takes_both or takes_one else Any,
        backoff=backoff or Backoff(),
        grace=seconds,
        isolation=where,
        is_failure=is_failure,
        concurrency=MOST_TASKS_AT_ONCE if concurrency is None else check_concurrency(concurrency, InvalidHandler),
        progress_raises=progress_raises,
        reuse=_check_reuse(reuse, name, where),
    )


def _name_of(function: Any) -> str:
    try:
        name = getattr(function, "__qualname__", None)
    except Exception:  # noqa: BLE001  as in `make_handler`
        name = None
    return name if isinstance(name, str) else shown(function)


def _check_isolation(asked: object, name: str, *, is_coroutine: bool) -> Isolation:
    """Return the requested isolation after validating it, or the default if no isolation was requested."""
    fits: Isolation = "coroutine" if is_coroutine else "thread"
    if asked is None:
        return fits
    if not isinstance(asked, str) or exact_text(asked) not in get_args(Isolation):
        choices = ", ".join(map(repr, get_args(Isolation)))
        raise InvalidHandler(
            f"isolation={shown(asked)} is invalid for {name}: there is no such isolation mode. Use one of {choices}."
        )
    asked = exact_text(asked)
    if asked == "process":
        if sys.platform == "win32":
            raise InvalidHandler(
                f"isolation='process' is invalid for {name}: this mode is not supported on Windows. "
                f"Use isolation={fits!r}."
            )
        return "process"
    if asked != fits:
        kind = "an async function" if is_coroutine else "a plain function"
        raise InvalidHandler(
            f"isolation={asked!r} is invalid for {name}: {kind} cannot run in this mode. Use {fits!r} or 'process'."
        )
    return fits


def _check_reuse(reuse: object, name: str, isolation: Isolation) -> int:
    """Return the maximum number of tasks per process after validating it. The default is 1."""
    if reuse is None:
        return 1
    if isolation != "process":
        raise InvalidHandler(
            f"reuse={shown(reuse)} is invalid for {name}: isolation is {isolation!r}. "
            "Omit reuse, or use isolation='process'."
        )
    return check_count("reuse", reuse, 1, MOST_REUSE, "the number of tasks that one process runs", InvalidHandler)


def _is_payload(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function's only parameter receives the payload, according to its annotation or name."""
    try:
        kind = _annotation(function, name)
    except InvalidHandler:  # a type that only type checkers import, such as Job
        return name == "payload"
    if kind is Any or kind is object or isinstance(kind, TypeVar):
        return name == "payload"
    parts = (kind, *get_args(kind))
    is_job = any(isinstance(part, type) and (issubclass(part, Job) or _is_protocol(part)) for part in parts)
    return not is_job and name != "job"


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _payload_type(function: Callable[..., Any], name: str) -> Any:
    """Return the annotated type of a parameter, and check that JSON can be converted to the type."""
    kind = _annotation(function, name)
    try:
        if kind is not bytes:
            _check_decodable(kind)
    except Exception as error:  # noqa: BLE001  msgspec evaluates the annotations of the type's fields
        title = repr(getattr(_annotated(function), "__qualname__", function))
        raise InvalidHandler(
            f"the payload type of {title} is not supported: {error}. Use JSON types, a dataclass or a msgspec Struct."
        ) from None
    return kind


def _check_decodable(kind: Any) -> None:
    """Raise TypeError if no JSON value can be converted to a type."""
    msgspec.json.Decoder(kind)
    found = json_types.undecodable(kind)
    if found is not None:
        raise TypeError(f"no JSON value can be converted to {found.__qualname__}")


def result_type(function: Callable[..., Any]) -> Any:
    """Return the annotated return type of a function, or Any if it is missing or not supported."""
    try:
        kind = _annotation(function, "return")
        _check_decodable(kind)
    except Exception:  # noqa: BLE001  as in `_payload_type`
        return Any
    return kind


def _annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that holds the annotations of a callable.

    The callable may be a function, a method, a partial or an object with `__call__`.
    """
    while isinstance(function, functools.partial):
        function = function.func
    try:
        annotated = hasattr(function, "__annotations__")
    except Exception:  # noqa: BLE001  from Python 3.14 on, this evaluates the annotations, which may raise anything
        annotated = True
    return function if annotated or inspect.isroutine(function) else type(function).__call__


def _written_annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a dict that maps the parameters of a function (and ``return``) to their annotations.

    An annotation that contains an undefined name may be a string or a forward reference.

    Raises:
        Exception: an annotation was evaluated, and raised this error.
    """
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(function, format=annotationlib.Format.FORWARDREF)
    return getattr(function, "__annotations__", {})


def _annotation(function: Callable[..., Any], name: str) -> Any:
    """Return the annotated type of a parameter (or of ``return``), or Any if the parameter has no annotation.

    Raises:
        InvalidHandler: the annotation cannot be resolved.
    """
    function = _annotated(function)
    title = repr(getattr(function, "__qualname__", function))
    try:
        written = _written_annotations(function).get(name, Any)
        holder = type("holder", (), {"__annotations__": {name: written}, "__module__": function.__module__})
        spaces = getattr(function, "__globals__", {})
        return typing.get_type_hints(holder, spaces, {}, include_extras=True)[name]
    except Exception as error:  # noqa: BLE001  an annotation is an expression, which may raise anything
        raise InvalidHandler(
            f"the annotations of {title} cannot be resolved: {error}. "
            "Define or import the types in the function's module."
        ) from None
