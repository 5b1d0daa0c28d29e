"""Figures of stages as Prometheus gets them from a real Ray node."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request

import pytest

from infra import metrics
from infra.progress import Bar
from tests.helpers.nodes import wait_until


@pytest.mark.slow  # the exporter takes its time
def test_prometheus_sees_what_stages_say(local_ray: None) -> None:
    import ray

    with Bar("probe", 100) as bar:
        bar.skip(30)
        bar.advance(70)
    metrics.gauge("latentforge_mfu", 0.25, stage="probe")
    metrics.gauge("latentforge_data_wait_share", 0.5, stage="probe")
    metrics.count("latentforge_retries", 2, what="probe")
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, float] = {}

    def complete() -> bool:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = re.findall(r'^ray_latentforge_(\w+)\{.*="probe".*\} (\S+)$', answer.read().decode(), re.M)
        found.update({name: float(value) for name, value in lines})
        return len(found) >= len(metrics.COUNTERS) + len(metrics.GAUGES)

    wait_until(complete, f"all figures were there, found {found}", 90)
    assert found.pop("images_per_second") > 0
    assert found == {"rows_total": 70, "rows_left": 0, "mfu": 0.25, "data_wait_share": 0.5, "retries_total": 2}


def test_outside_ray_nothing_is_counted_and_ray_not_imported() -> None:
    script = (
        "import sys; from infra.progress import Bar\n"
        "with Bar('probe', 2) as bar: bar.advance(2)\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
