"""Build metrics as prometheus-client expects them. Import this module only if prometheus-client is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from nqnb.metrics.histogram import Histogram

Values = Mapping[Any, float]
"""A value for each combination of labels, which is a tuple of strings."""


def gauge(name: str, text: str, values: Values, *labels: str) -> Metric:
    """Return a value that can go up and down."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def counter(name: str, text: str, values: Values, *labels: str) -> Metric:
    """Return a value that only increases. The library adds ``_total`` to the name."""
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def durations(name: str, text: str, values: Mapping[str, Histogram]) -> Metric:
    """Return the histogram of durations for each queue."""
    family = HistogramMetricFamily(name, text, labels=("queue",))
    for queue, histogram in values.items():
        family.add_metric((queue,), histogram.buckets, histogram.seconds)
    return family


def one(value: float) -> Values:
    """Return a value without labels."""
    return {(): value}
