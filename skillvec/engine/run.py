"""How a plan is run: what every verb takes beside what it makes, packed once.

Hides how an engine is chosen. Everything below the public functions takes a Run.
"""

import os
from dataclasses import dataclass

from skillvec.engine.threads import Engine, Threads
from skillvec.errors import UsageError
from skillvec.report import Watcher

ENGINES = ("threads", "serial", "ray")


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The engine that runs the jobs, and how a run goes about its output.

    `stream` reads checkpoints on the Hub shard by shard; `dry_run` ends with the plan; `force`
    replaces an existing output; `watcher` is told of plan and progress.
    """

    engine: Engine
    stream: bool = False
    dry_run: bool = False
    force: bool = False
    watcher: Watcher | None = None

    @classmethod
    def by(
        cls, engine: str = "threads", workers: int | None = None, *, stream: bool = False,
        dry_run: bool = False, force: bool = False, watcher: Watcher | None = None,
    ) -> "Run":  # fmt: skip
        """Return the Run of the options that public functions take; UsageError for unknown ones."""
        return cls(choose_engine(engine, workers), stream, dry_run, force, watcher)


def choose_engine(name: str, workers: int | None) -> Engine:
    """Return the engine of a name: threads, serial (the calling thread alone), ray."""
    if workers is not None and workers < 1:
        raise UsageError(f"workers {workers}: expected at least 1")
    if name == "ray":
        from skillvec.engine.ray_cluster import Cluster

        return Cluster(workers)
    if name not in ENGINES:
        raise UsageError(f"engine {name!r}: expected one of {', '.join(ENGINES)}")
    if name == "serial" and (workers or 1) > 1:
        raise UsageError(f"workers {workers}: engine serial is the calling thread alone")
    # macOS does not say which cores are ours
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Threads(0 if name == "serial" else workers or min(16, cores or 1))
