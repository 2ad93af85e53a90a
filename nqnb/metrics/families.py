"""Build metric families for prometheus-client. Import this module only if prometheus-client is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from nqnb.metrics.histogram import Histogram

Values = Mapping[Any, float]
"""A value for each combination of label values. A combination is a tuple of strings."""


def gauge(name: str, text: str, values: Values, *labels: str) -> Metric:
    """Return a gauge, which is a metric whose value can go up and down.

    Args:
        name: the name of the metric.
        text: the help text.
        values: the value for each combination of label values.
        *labels: the names of the labels.
    """
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def counter(name: str, text: str, values: Values, *labels: str) -> Metric:
    """Return a counter, which is a metric that only increases. The library adds ``_total`` to the name.

    See `gauge` for the arguments.
    """
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def durations(name: str, text: str, values: Mapping[str, Histogram]) -> Metric:
    """Return a histogram of durations, with the label ``queue``."""
    family = HistogramMetricFamily(name, text, labels=("queue",))
    for queue, histogram in values.items():
        family.add_metric((queue,), histogram.buckets, histogram.seconds)
    return family


def one(value: float) -> Values:
    """Return a value as the `Values` of a metric without labels."""
    return {(): value}
