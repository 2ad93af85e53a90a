"""Which functions can handle tasks, and what arguments they receive."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypedDict

import msgspec
import pytest

import nqnb
from nqnb.errors import BadInput, InvalidHandler, InvalidQueueName
from nqnb.inputs import check_callable
from nqnb.retry import Backoff
from nqnb.worker.handlers import Handler, make_handler, result_type
from nqnb.worker.job import Job


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Box(msgspec.Struct):
    corner: Point
    name: str = ""


class Size(TypedDict):
    width: int


def job_of(payload: bytes) -> Job:
    return Job("a", "q", payload, 1, 0, None, lambda: None)


def handed(function: Callable[..., Any], payload: bytes) -> Any:
    """Return what a handler receives for a payload; the functions here return it."""
    return make_handler("q", function).call(job_of(payload))()


@dataclasses.dataclass
class Unreadable:
    x: Missing  # type: ignore[name-defined]  # noqa: F821  the test needs a name that is not defined


class Unconvertible:
    """A type that JSON cannot represent."""


class LateAnnotations:
    """What a function of Python 3.14 does if its annotations name a type that is not defined."""

    def __init__(self, *names: str) -> None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])

    def __getattribute__(self, name: str) -> Any:
        # Before Python 3.14, `inspect` reads this attribute, too.
        if name == "__annotations__" and sys._getframe(1).f_globals["__name__"] != "inspect":
            raise NameError("name 'Missing' is not defined")
        return super().__getattribute__(name)

    def __call__(self, *arguments: Any) -> Any:
        return arguments


class TestSignatures:
    def test_job_alone(self) -> None:
        handler = make_handler("q", lambda job: job.id)
        assert not handler.takes_payload
        assert handler.call(job_of(b"not json"))() == "a"

    def test_job_and_payload(self) -> None:
        assert handed(lambda job, payload: (job.id, payload), b'{"a":[1]}') == ("a", {"a": [1]})

    def test_parameter_names_do_not_matter(self) -> None:
        assert handed(lambda j, /, p: p, b"5") == 5

    def test_a_second_parameter_with_a_default_is_the_handlers_own(self) -> None:
        assert handed(lambda job, factor=3: factor, b"5") == 3

    def test_the_first_of_two_parameters_is_not_a_payload(self) -> None:
        def resize(path: str, width: int) -> None: ...

        def swapped(payload, job): ...  # type: ignore[no-untyped-def]  # a beginner's handler

        for function in (resize, swapped):
            with pytest.raises(InvalidHandler, match=r"the first of two parameters receives the Job, but the name or"):
                make_handler("q", function)

    def test_further_parameters_with_defaults_are_left_alone(self) -> None:
        assert handed(lambda job, payload, factor=3, *, deep=True: (payload, factor, deep), b"5") == (5, 3, True)

    def test_star_arguments_are_left_alone(self) -> None:
        assert handed(lambda job, *args, **options: (args, options), b"5") == ((), {})

    def test_a_bound_method(self) -> None:
        class Service:
            def handle(self, job: Job, payload: int) -> tuple[object, int]:
                return self, payload

        service = Service()
        assert handed(service.handle, b"5") == (service, 5)

    def test_a_partial(self) -> None:
        def scale(factor: int, job: Job, payload: int) -> int:
            return factor * payload

        assert handed(functools.partial(scale, 3), b"5") == 15

    def test_an_object_that_can_be_called(self) -> None:
        class Scale:
            def __call__(self, job: Job, payload: Point) -> Point:
                return payload

        assert handed(Scale(), b'{"x":1}') == Point(1.0)

    def test_a_decorated_function_keeps_its_annotations(self) -> None:
        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def wrapper(*args: Any, **options: Any) -> Any:
                return function(*args, **options)

            return wrapper

        @timed
        def handle(job: Job, payload: Point) -> Point:
            return payload

        assert handed(handle, b'{"x":1}') == Point(1.0)

    def test_what_is_a_coroutine(self) -> None:
        async def function(job: Job) -> None: ...

        class Asynchronous:
            async def __call__(self, job: Job) -> None: ...

        @functools.wraps(function)
        async def wrapped(*args: Any) -> None: ...

        assert make_handler("q", function).is_coroutine
        assert make_handler("q", wrapped).is_coroutine
        assert make_handler("q", functools.partial(function)).is_coroutine
        assert make_handler("q", Asynchronous()).is_coroutine
        assert not make_handler("q", lambda job: None).is_coroutine

    @pytest.mark.parametrize(
        "function",
        [
            lambda: None,
            lambda job, payload, more: None,
            lambda job, *, needed: None,
            lambda *, job: None,
            lambda **options: None,
        ],
    )
    def test_a_wrong_signature_is_refused(self, function: Callable[..., Any]) -> None:
        with pytest.raises(
            InvalidHandler, match=r"cannot handle tasks: its parameters must be \(job\), \(payload\) or"
        ):
            make_handler("q", function)

    def test_the_refusal_shows_the_signature(self) -> None:
        def resize(job: Job, path: str, size: int) -> None: ...

        with pytest.raises(InvalidHandler, match=r"resize\(job: .*Job.*, path: .*str.*, size: .*int.*\) .*cannot"):
            make_handler("q", resize)

    @pytest.mark.parametrize("thing", [None, 5, "resize", [print]])
    def test_an_object_that_is_not_callable_is_refused(self, thing: Any) -> None:
        with pytest.raises(InvalidHandler, match=r"it is not callable\. Use a function whose parameters are \(job\),"):
            make_handler("q", thing)

    def test_an_object_that_fails_while_it_is_inspected_is_refused(self) -> None:
        class Silent:
            def __getattr__(self, name: str) -> Any:
                raise RuntimeError(name)

            def __call__(self, *, job: Job) -> None: ...

        with pytest.raises(InvalidHandler):
            make_handler("q", Silent())

    def test_a_function_without_a_signature_is_refused(self) -> None:
        with pytest.raises(InvalidHandler):
            make_handler("q", dict)

    def test_generators_are_refused(self) -> None:
        def generator(job: Job) -> Iterator[int]:
            yield 1

        async def generates(job: Job) -> AsyncIterator[int]:
            yield 1

        for function in (generator, generates, functools.partial(generator)):
            with pytest.raises(InvalidHandler, match=r"it is a generator function\. Return the result"):
                make_handler("q", function)


class TestPayload:
    def test_a_bytes_annotation_receives_the_raw_payload(self) -> None:
        def handle(job: Job, payload: bytes) -> bytes:
            return payload

        assert handed(handle, b"\x00\xff") == b"\x00\xff"
        assert handed(handle, b"") == b""

    def test_a_parameter_without_annotation_receives_the_decoded_json(self) -> None:
        assert handed(lambda job, payload: payload, b'{"a":1}') == {"a": 1}
        assert handed(lambda job, payload: payload, b"") is None

    @pytest.mark.parametrize(
        ("annotation", "data", "value"),
        [
            (Point, b'{"x":1}', Point(1.0)),
            (Box, b'{"corner":{"x":1,"y":2},"unknown":5}', Box(Point(1.0, 2.0))),
            (Size, b'{"width":3}', {"width": 3}),
            (dict, b"{}", {}),
            (list[Point], b'[{"x":1}]', [Point(1.0)]),
            (int | None, b"", None),
            (tuple[int, str], b'[1,"a"]', (1, "a")),
            (Any, b"[1]", [1]),
        ],
    )
    def test_a_payload_is_validated_by_the_annotation(self, annotation: Any, data: bytes, value: object) -> None:
        def handle(job: Job, payload: Any) -> Any:
            return payload

        handle.__annotations__["payload"] = annotation
        got = handed(handle, data)
        assert got == value
        assert type(got) is type(value)

    @pytest.mark.parametrize(
        ("data", "where"),
        [
            (b'{"x":"one"}', r"Expected `float`, got `str` - at `\$\.x`"),
            (b"{}", "missing required field `x`"),
            (b"[]", "Expected `object`, got `array`"),
            (b"", "Expected `object`, got `null`"),
            (b'{"x":', "truncated"),
            (b"\xff", ""),
        ],
    )
    def test_a_payload_that_does_not_fit_is_refused_with_the_place(self, data: bytes, where: str) -> None:
        def resize(job: Job, payload: Point) -> None: ...

        with pytest.raises(BadInput, match=f"the payload does not match .*resize: .*{where}"):
            make_handler("q", resize).call(job_of(data))

    def test_an_annotation_that_cannot_be_read_is_refused(self) -> None:
        def handle(job: Job, payload: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

        with pytest.raises(InvalidHandler, match=r"'.*handle' cannot be resolved: name 'Missing' is not defined"):
            make_handler("q", handle)

    def test_only_the_payloads_annotation_needs_to_be_readable(self) -> None:
        def handle(job: Missing, payload: int) -> Other:  # type: ignore[name-defined]  # noqa: F821
            return payload

        assert handed(handle, b"5") == 5

    def test_an_annotation_that_raises_any_error_is_refused(self) -> None:
        def handle(job: Job, payload: "1 / 0") -> "1 / 0": ...  # type: ignore[valid-type]  # noqa: UP037  as text

        with pytest.raises(InvalidHandler, match=r"'.*handle' cannot be resolved: division by zero"):
            make_handler("q", handle)
        assert result_type(handle) is Any

    def test_a_type_whose_fields_cannot_be_read_is_refused(self) -> None:
        def handle(job: Job, payload: Unreadable) -> Unreadable:
            return payload

        with pytest.raises(InvalidHandler, match=r"'.*handle' is not supported: name 'Missing' is not defined"):
            make_handler("q", handle)
        assert result_type(handle) is Any

    def test_a_type_that_no_json_matches_is_refused(self) -> None:
        def handle(job: Job, payload: list[Unconvertible]) -> list[Unconvertible]:
            return payload

        with pytest.raises(InvalidHandler, match=r"'.*handle' is not supported: no JSON .* converted to Unconvertible"):
            make_handler("q", handle)
        assert result_type(handle) is Any

    def test_annotations_that_are_evaluated_late_may_be_unreadable(self) -> None:
        assert not make_handler("q", LateAnnotations("job")).takes_payload
        assert not make_handler("q", LateAnnotations("task")).takes_payload
        for names in (["payload"], ["job", "payload"]):
            with pytest.raises(InvalidHandler, match=r"cannot be resolved: name 'Missing' is not defined"):
                make_handler("q", LateAnnotations(*names))
        assert result_type(LateAnnotations("job")) is Any

    @pytest.mark.skipif(sys.version_info < (3, 14), reason="older versions evaluate annotations early")
    def test_python_3_14_evaluates_annotations_late(self) -> None:
        def defined(code: str) -> Any:
            scope: dict[str, Any] = {"Point": Point, "__name__": __name__}
            exec(compile(code, "<late>", "exec", dont_inherit=True), scope)  # noqa: S102  this file has a future import
            return scope["handle"]

        assert not make_handler("q", defined("def handle(job: Missing): ...")).takes_payload
        both = defined("def handle(job: Missing, payload: Point) -> Other: return payload")
        assert handed(both, b'{"x":1}') == Point(1.0)
        assert result_type(both) is Any
        for annotation in ("Missing", "list[Missing]", "Missing | None", "Point.missing"):
            with pytest.raises(InvalidHandler, match=r"'handle' cannot be resolved: .*[Mm]issing"):
                make_handler("q", defined(f"def handle(job, payload: {annotation}): ..."))
        with pytest.raises(InvalidHandler, match=r"handle\(job: 'Missing', a, b\) cannot handle tasks: its parameters"):
            make_handler("q", defined("def handle(job: Missing, a, b): ..."))
        with pytest.raises(BadInput, match="cannot be called with 1 argument"):
            check_callable("key", defined("def handle(a: Missing, b): ..."), "a function", 1)

    @pytest.mark.parametrize("annotation", [Point | Box, dict[int, list[Point | Box]]])
    def test_an_annotation_that_cannot_be_validated_is_refused_at_once(self, annotation: Any) -> None:
        def handle(job: Job, payload: Any) -> None: ...

        handle.__annotations__["payload"] = annotation
        with pytest.raises(InvalidHandler):
            make_handler("q", handle)


class TestOptions:
    def test_defaults(self) -> None:
        handler = make_handler("q", lambda job: None)
        assert (handler.queue, handler.backoff, handler.grace) == ("q", Backoff(), 1.0)

    @pytest.mark.parametrize("backoff", [3, "x", (1, 60)])
    def test_a_backoff_of_another_type_is_refused(self, backoff: Any) -> None:
        with pytest.raises(
            InvalidHandler, match=r"backoff=.* is invalid for .*: expected a Backoff, got .* Use Backoff\(first, most\)"
        ):
            make_handler("q", lambda job: None, backoff=backoff)

    def test_is_failure_must_be_callable(self) -> None:
        judge: Any = 3
        with pytest.raises(InvalidHandler, match=r"is_failure=3 is invalid for .*: .* Use a function with one par"):
            make_handler("q", lambda job: None, is_failure=judge)

    @pytest.mark.parametrize("grace", [0, -1, float("nan"), "1", None, True])
    def test_grace_is_above_zero(self, grace: Any) -> None:
        with pytest.raises(InvalidHandler, match=f"grace={grace!r} is invalid: .* Pass seconds or a timedelta"):
            make_handler("q", lambda job: None, grace=grace)

    @pytest.mark.parametrize("concurrency", [0, -1, 1.5, "2", True])
    def test_concurrency_is_a_whole_number_above_zero(self, concurrency: Any) -> None:
        with pytest.raises(
            InvalidHandler, match=f"concurrency={concurrency!r} is invalid: .* Pass the number of tasks"
        ):
            make_handler("q", lambda job: None, concurrency=concurrency)

    @pytest.mark.parametrize("queue", ["a b", "", "x_cancel", None])
    def test_queue_names_are_checked(self, queue: Any) -> None:
        with pytest.raises(InvalidQueueName):
            make_handler(queue, lambda job: None)


class TestRegistering:
    def test_the_decorator_returns_the_function_unchanged(self) -> None:
        worker = nqnb.Worker()

        def handle(job: Job) -> None: ...

        assert worker.handler("q", grace=2, backoff=Backoff(0, 0))(handle) is handle
        assert isinstance(worker.handlers["q"], Handler)
        assert worker.handlers["q"].grace == 2

    def test_queues_are_in_the_order_of_their_handlers(self) -> None:
        worker = nqnb.Worker()
        for queue in ("c", "a", "b"):
            worker.handler(queue)(lambda job: None)
        assert list(worker.handlers) == ["c", "a", "b"]
        assert "c, a, b" in repr(worker)

    def test_a_second_handler_of_a_queue_is_refused(self) -> None:
        worker = nqnb.Worker()
        worker.handler("q")(lambda job: 1)
        with pytest.raises(InvalidHandler, match="queue 'q' already has a handler"):
            worker.handler("q")(lambda job: 2)
        assert worker.handlers["q"].function(None) == 1

    def test_a_decorator_without_its_queue_is_refused(self) -> None:
        worker = nqnb.Worker()
        with pytest.raises(
            InvalidHandler, match=r'handle: @worker\.handler was used without .* Write @worker\.handler\("QUEUE"\)'
        ):

            @worker.handler  # type: ignore[arg-type]
            def handle(job: Job) -> None: ...

    @pytest.mark.parametrize("concurrency", [0, -1, 1.5, "8", None, True])
    def test_concurrency_is_a_number_of_tasks(self, concurrency: Any) -> None:
        with pytest.raises(BadInput, match=f"concurrency={concurrency!r} is invalid: .* Pass the number of tasks"):
            nqnb.Worker(concurrency=concurrency)

    @pytest.mark.parametrize("seconds", [-1, float("nan"), "5", None])
    def test_shutdown_timeout_is_in_seconds(self, seconds: Any) -> None:
        with pytest.raises(BadInput, match=f"shutdown_timeout={seconds!r} is invalid: .* Pass seconds"):
            nqnb.Worker(shutdown_timeout=seconds)
