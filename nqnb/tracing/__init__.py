"""Traces with OpenTelemetry: spans for submits, waits, runs and cancels, with one trace for each task.

Tracing is off until `instrument` is called. Until then, nqnb does not import opentelemetry, and each place that could
create a span only checks that `active` is None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nqnb.error_text import clause
from nqnb.errors import TracingUnavailable

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext as SpanContext
    from opentelemetry.trace import TracerProvider

    from nqnb.tracing.spans import Spans

active: Spans | None = None
"""The object that creates spans, or None while tracing is off."""


def instrument(tracer_provider: TracerProvider | None = None) -> None:
    """Create spans for the tasks of all clients and workers in this process.

    If this function is called again, the last call determines the provider.

    Args:
        tracer_provider: the provider of the spans. By default, OpenTelemetry's global provider is used, even if it is
            set after this call.

    Raises:
        TracingUnavailable: opentelemetry-api is not installed.

    Examples:
        >>> from nqnb import tracing
        >>> tracing.instrument()
        >>> task = await nq.submit("resize", {"path": "a.png"})  # creates a span
        >>> tracing.uninstrument()
    """
    global active
    try:
        from nqnb.tracing.spans import Spans
    except ImportError as error:
        raise TracingUnavailable(
            f"tasks cannot be traced: opentelemetry-api cannot be imported ({clause(error)}). "
            "Run `pip install 'nqnb[otel]'`."
        ) from None
    active = Spans(tracer_provider)


def uninstrument() -> None:
    """Stop creating spans. Spans that have already been started are still ended.

    Examples:
        >>> from nqnb import tracing
        >>> tracing.uninstrument()
    """
    global active
    active = None


def within(submitted: SpanContext | None) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that adds the spans of waits and cancels to the trace in which a task was submitted.

    If there is already a current span, that span remains the parent, and the new spans are linked to the submit span.

    Args:
        submitted: the context of the submit's span. If None, the context manager does nothing.
    """
    if active is None or submitted is None:
        return contextlib.nullcontext()
    return active.within(submitted)


def continuing(headers: Mapping[str, str]) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that sets the current trace context from the headers of a message.

    If ``headers`` is empty, the context manager does nothing.
    """
    if not headers:
        return contextlib.nullcontext()
    from nqnb.tracing.spans import Attached, extract

    return Attached(extract(headers))


class Instrumentor:
    """The class that the program ``opentelemetry-instrument`` uses. In your own code, call `instrument`."""

    def instrument(self, **options: Any) -> None:
        """Call `instrument` with the option ``tracer_provider``. Other options are ignored."""
        instrument(options.get("tracer_provider"))

    def uninstrument(self, **options: Any) -> None:
        """Call `uninstrument`. All options are ignored."""
        uninstrument()
