"""A stage as the driver of a Ray job: `python -m tasks.job ROOT STAGE FINGERPRINT`.

What to do is in `job.json` in the artifact's folder. Exit status 0 when the artifact is complete, 1 on a mistake of a
person's, which is the last line, 70 on a defect, 75 where machines were lost or storage was out of reach and another
attempt may help.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.errors import Unreachable, UserError
from infra import logs
from infra.artifacts import Artifact
from infra.cluster import disconnect
from infra.early import started_early
from infra.jobs import DESCRIPTION, FAULT
from tasks.dag import load_stage
from tasks.stage import Context, Job, causes, perform

_LOCK = Path(__file__).parents[1] / "requirements.lock"
_TEMPORARY = 75
_PINNED = ("torch", "ray", "deepspeed", "pyarrow", "timm", "numpy", "mlflow", "safetensors")


def main(root: str, stage: str, fingerprint: str) -> int:
    """Perform the stage; the exit status."""
    logs.set_up()
    try:
        check_pins()
        context = Context(_described(Artifact(root, stage, fingerprint)))
        loaded, lead = load_stage(stage), context.recipe.compute.cluster.lead_seconds
        with started_early(context.job.following, loaded.share(context), lead):
            perform(loaded, context.job)
    except Unreachable as error:
        logs.say(str(error), "error")
        return _TEMPORARY
    except UserError as error:
        logs.say(str(error), "error", mistake=True)
        return 1
    except Exception as error:
        traceback.print_exc()
        return _TEMPORARY if any(map(_is_rays, causes(error))) else FAULT
    finally:
        disconnect()
    return 0


def _is_rays(error: BaseException) -> bool:
    """Whether machines or processes were lost, beyond what the stage survives by itself."""
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RaySystemError, WorkerCrashedError

    if isinstance(error, RayActorError) and error.actor_init_failed:
        return False  # its constructor raised, as it would again
    return isinstance(error, (NodeDiedError, ObjectLostError, RayActorError, RaySystemError, WorkerCrashedError))


def check_pins(lock: Path = _LOCK) -> None:
    """Compare what is installed here with the lock that the code came with.

    Raises:
        UserError: a library that decides results has another version.
    """
    if not lock.is_file():
        return
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.M))
    for name in _PINNED:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if name in pins and found.split("+")[0] != pins[name].split("+")[0]:
            raise UserError(
                f"the cluster's image has {name} {found}, and requirements.lock pins {pins[name]}: build the image "
                "from this lock (infra/container/Dockerfile)"
            )


def _described(artifact: Artifact) -> Job:
    """The job as the flow left it, tracked where this machine sees the tracker."""
    try:
        job = Job(**json.loads(artifact.storage.read_bytes(DESCRIPTION)))
    except FileNotFoundError:
        raise UserError(
            f"the cluster does not see {artifact.uri}/{DESCRIPTION}: give --root a bucket, or a folder that all "
            "machines share"
        ) from None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or job.tracking.get("uri", "")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"the cluster does not see MLflow's {uri}: set MLFLOW_TRACKING_URI to a server that it reaches")
    return replace(job, tracking={**job.tracking, "uri": uri}) if job.tracking else job


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
