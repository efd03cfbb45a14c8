"""A real cluster of Ray on this machine: several raylets, a node each."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STORE_NBYTES = 80 << 20  # of the object store of a node: the least that Ray takes


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """Yield a running ray.cluster_utils.Cluster of nodes of one CPU, which RAY_ADDRESS names.

    A dead node is noticed after a second. Whoever connects is disconnected at the end.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray.cluster_utils import Cluster

    health = {"initial_delay_ms": 0, "period_ms": 300, "failure_threshold": 3}
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_NBYTES,
            "_system_config": {f"health_check_{key}": value for key, value in health.items()},
        },
    )  # fmt: skip
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = made.address
    try:
        for _ in range(nodes - 1):
            add_node(made)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def add_node(made: Any, **options: Any) -> Any:
    """Start one more node of one CPU and return it."""
    return made.add_node(num_cpus=1, object_store_memory=STORE_NBYTES, **options)
