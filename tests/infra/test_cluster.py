"""A local Ray and the others of its machine."""

from __future__ import annotations

import os


def test_workers_know_the_ray_that_they_are_of(local_ray: None) -> None:
    """Ray Train's watcher asks from a worker whether its training lives; another Ray would say that it does not."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address_or_die

    found = ray.get(ray.remote(num_cpus=0)(lambda: canonicalize_bootstrap_address_or_die(None)).remote())
    assert found == ray.get_runtime_context().gcs_address
    assert "RAY_ADDRESS" not in os.environ and "RAY_GCS_SERVER_PORT" not in os.environ, "commands start their own"
