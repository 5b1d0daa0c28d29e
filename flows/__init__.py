"""Prefect flows: which stages, in which order; and the command line.

Prefect, MLflow and Ray read their settings at import, so the embedded default's are set here, before any
of them loads. Whatever the environment already says wins.
"""

import os
import sys
from pathlib import Path

_CODE = str(Path(__file__).parents[1])
if _CODE not in sys.path[:1]:  # PYTHONPATH may name another project, with packages of the names of ours
    sys.path.insert(0, _CODE)
if os.environ.get("PYTHONPATH"):  # and so for the processes that Ray starts
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [_CODE, *(each for each in os.environ["PYTHONPATH"].split(os.pathsep) if each != _CODE)]
    )

from infra import machine, proxies  # noqa: E402
from infra.home import place  # noqa: E402

proxies.spare_loopback()
if machine.cpu_quota() is not None:  # else every library would start a thread for each CPU of the whole machine
    os.environ.setdefault("OMP_NUM_THREADS", str(machine.cpus()))
if os.environ.get("LATENTFORGE_LOGS") == "json":
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER", "json")

for _name, _value in {
    "PREFECT_HOME": str(place() / "prefect"),
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)
