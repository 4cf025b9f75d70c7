"""The metrics of one process for Prometheus, in a registry of their own: the only prometheus_client door.

The service shows them under /metrics; ``reindex --metrics-file`` writes those of a run for node-exporter's textfile
collector, whole or not at all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, write_to_textfile

from pipeline.errors import StorageError
from pipeline.metrics import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Meters:
    """Instruments of some metrics; asking for one that is not among them, or is of another kind, is a KeyError."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._registry = registry = CollectorRegistry()
        names = {metric: (metric.name, metric.help, metric.labels) for metric in metrics}
        self._counters = {each: Counter(*names[each], registry=registry) for each in metrics if each.kind == "counter"}
        self._gauges = {each: Gauge(*names[each], registry=registry) for each in metrics if each.kind == "gauge"}
        self._histograms = {
            each: Histogram(*names[each], buckets=each.buckets, registry=registry)
            for each in metrics
            if each.kind == "histogram"
        }

    def count(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        counter = self._counters[metric]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Record a value in a histogram."""
        histogram = self._histograms[metric]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def level(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[metric]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def follow(self, metric: Metric, read: Callable[[], float], **labels: str) -> None:
        """Have a gauge ask ``read`` whenever it is read."""
        gauge = self._gauges[metric]
        (gauge.labels(**labels) if labels else gauge).set_function(read)

    def text(self) -> bytes:
        """All of them in Prometheus's text format (CONTENT_TYPE)."""
        return generate_latest(self._registry)

    def write(self, file: Path) -> None:
        """The same as a file, put in place whole."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(file), self._registry)
        except OSError as error:
            raise StorageError(f"{file}: cannot be written, {error}; give another --metrics-file") from error
