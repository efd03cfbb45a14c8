"""The engine of a cluster: the jobs of a plan as tasks of Ray, over files that all nodes share.

Hides Ray. Through it go jobs, results and the sizes of rows, never values of tensors; what all
tasks have in common goes once. A task is a batch of whole jobs that `Threads` runs in the
worker, so there is one arithmetic. It writes at planned addresses itself, and returns when that is
on the disk. Rows, whose places depend on the rows before, wait in a file of the task until the
batches before are done; tasks then copy them to where they belong. A task that is lost with its
worker or node is run again and gives the same bytes. Before any work every node proves that it
sees the very files that the driver sees, and one that joins later does so in its first task.
"""

import contextlib
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from skillvec.engine.plan import Job, JobResult, Plan
from skillvec.engine.ray_tasks import (
    SCRATCH,
    Batch,
    Move,
    Shared,
    copy_ranges,
    receive_shared,
    run_batch,
    versions,
)
from skillvec.engine.threads import Found
from skillvec.errors import SkillvecError, UsageError, needs
from skillvec.files.file import (
    MiB,
    RemoteFile,
    forget_open_files,
    local_path,
    register_remote,
    remote_of,
)
from skillvec.files.fingerprints import fingerprints
from skillvec.files.output_file import OutputFile
from skillvec.files.rows import RowWriter
from skillvec.files.staging import STAGING_SUFFIX
from skillvec.vectors.deltas.base import views_in

BATCH_NBYTES = 512 * MiB  # read by a task: a second of work, of which scheduling is a hundredth
BATCHES = 4  # at least, for each worker
AHEAD = 4  # batches for each worker that may be begun, or wait for those before them
RETRIES = 3  # of a task that is lost
CONNECT_SECONDS = 10.0
GRACE_SECONDS = 10.0  # for tasks to end when the run is stopped


# ---------------------------------------------------------------------------------- in the workers


_held: dict[str, Shared] = {}  # by reference: what this process has got, the last one only


def _in_worker(
    references: Sequence[Any], proven: Sequence[str], work: Callable[..., Any], *arguments: Any
) -> Any:
    """Return what `work` gives, when this process has what is shared and, if need be, proved it."""
    ray = import_module("ray")
    try:
        (reference,) = references
        shared = _held.get(reference.hex())
        if shared is None:
            shared = ray.get(reference)
            for path, remote in shared.remotes.items():
                register_remote(path, remote)
            if ray.get_runtime_context().get_node_id() not in proven:
                _prove(shared)
            _held.clear()
            _held[reference.hex()] = shared
        return work(shared, *arguments)
    finally:
        forget_open_files()  # a file that is deleted meanwhile would keep its room


def _prove(shared: Shared) -> None:
    """Raise UsageError unless this node has the driver's versions and sees the driver's files."""
    ray = import_module("ray")
    node = f"node {ray.util.get_node_ip_address()} ({socket.gethostname()})"
    here = versions()
    for name, there in shared.versions.items():
        if here[name] != there:
            raise UsageError(
                f"{node}: has {name} {here[name]}, the driver {there}: install the same on all"
            )
    try:
        found = fingerprints(shared.inputs)
        if shared.scratch is not None:
            nonce = Path(shared.scratch, "driver").read_text()
            Path(shared.scratch, ray.get_runtime_context().get_node_id()).write_text(nonce)
            found[shared.scratch] = [nonce]
    except (SkillvecError, OSError) as error:
        raise UsageError(
            f"{node}: cannot read what the driver reads (all nodes need the same file system at the"
            f" same path, and credentials for what lies in a store): {error}"
        ) from None
    for path, seen in found.items():
        if seen != (shared.inputs.get(path) or [shared.nonce]):
            raise UsageError(
                f"{node}: {path} is not the driver's file (all nodes need the same file system at"
                " the same path)"
            )


# ----------------------------------------------------------------------------------- in the driver


class Cluster:
    """An Engine whose workers are tasks of one CPU on a cluster that runs already.

    Without `workers`, as many at once as the cluster has CPUs. Raises UsageError where Ray is not
    installed or there is no cluster; none is ever started.
    """

    def __init__(self, workers: int | None) -> None:
        self._ray = _connected()
        nodes = _nodes(self._ray)
        if not nodes:
            raise UsageError("engine ray: no node of the cluster has a CPU for tasks")
        self.workers = workers or sum(int(node["Resources"]["CPU"]) for node in nodes)
        self.in_process = 1
        self.name = f"ray, {len(nodes)} node{'s' * (len(nodes) > 1)}"

    def run(
        self,
        plan: Plan,
        outputs: Sequence[OutputFile] = (),
        writer: RowWriter | None = None,
        progress: Callable[[int], None] = lambda done_nbytes: None,
        finished: Callable[[int, JobResult], None] = lambda number, result: None,
    ) -> Found:
        """See engine.Engine; raises UsageError, before any work, for nodes with other files."""
        files = [*outputs, *(writer.files if writer is not None else ())]
        with contextlib.ExitStack() as stack:
            scratch = None
            if files:
                scratch = _scratch(files[0].path)
                stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            for file in files:
                file.hand_over()
            run = _ClusterRun(
                self._ray, self.workers, plan, outputs, writer, scratch, progress, finished
            )
            stack.callback(run.stop)
            found = run.run()
            for file in [*outputs, *(writer.files if writer is not None else ())]:
                file.hand_over()  # what this machine has read of them may be old
        return found


def _connected() -> Any:
    """Return Ray, connected to the cluster of this process, of RAY_ADDRESS or of this machine."""
    with needs("ray", "engine ray (on every node)"):
        ray = import_module("ray")
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        if address == "local":  # Ray would start one
            raise ConnectionError("RAY_ADDRESS is local")
        host, _, port = address.rpartition(":")
        if port.isdecimal() and "/" not in host:  # Ray would try for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        # else what befalls other machines is printed between our lines on stdout
        worker: Any = import_module("ray._private.worker")
        worker._worker_logs_enabled = False
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            "engine ray: no cluster can be reached: start one (`ray start --head`, on the other"
            " nodes `ray start --address HOST:PORT`) and name it in RAY_ADDRESS as HOST:PORT"
            f" ({reason})"
        ) from None
    return ray


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _scratch(path: str) -> str:
    """Return a fresh folder in the staging folder that a file of the output lies in."""
    stage = next(parent for parent in Path(path).parents if parent.name.endswith(STAGING_SUFFIX))
    shutil.rmtree(stage / SCRATCH, ignore_errors=True)  # of a run that was killed
    (stage / SCRATCH).mkdir()
    return os.fspath(stage / SCRATCH)


def batches(jobs: Sequence[Job], workers: int) -> list[range]:
    """Cut jobs into ranges that read BATCH_NBYTES, or less where every worker should have some.

    Jobs that view the same stored tensor stay together, since each batch checks it as a whole.
    """
    total = sum(job.nbytes_read for job in jobs)
    limit = min(BATCH_NBYTES, total // (BATCHES * workers))
    found, begin, held, viewed = [], 0, 0, set[str]()
    for number, job in enumerate(jobs):
        parts = {part.key for view in views_in(job.deltas) for part in view.parts}
        if held and held + job.nbytes_read > limit and not parts & viewed:
            found.append(range(begin, number))
            begin, held, viewed = number, 0, set()
        held += job.nbytes_read
        viewed |= parts
    return [*found, range(begin, len(jobs))] if jobs else []


class _LostError(SkillvecError):
    """A task went with its worker or node, each time it was run."""


class _ClusterRun:
    """One run: batches and copies in flight, and the order in which rows get their places."""

    def __init__(
        self,
        ray: Any,
        workers: int,
        plan: Plan,
        outputs: Sequence[OutputFile],
        writer: RowWriter | None,
        scratch: str | None,
        progress: Callable[[int], None],
        finished: Callable[[int, JobResult], None],
    ) -> None:
        self._ray, self._workers, self._jobs, self._writer = ray, workers, plan.jobs, writer
        self._progress, self._finished, self._scratch = progress, finished, scratch
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_in_worker)
        self._flight: dict[Any, tuple[str, Callable[[Any], None]]] = {}  # and what comes then
        self._proven: list[str] = []
        self._batches = batches(plan.jobs, workers)
        self._begun = self._placed = self._ended = 0  # of the batches
        self._waiting: dict[int, Batch] = {}  # for those before them
        self._copies: list[tuple[int, Batch, list[Move]]] = []
        self._whole: dict[int, Batch] = {}  # for those before them, again
        self._results: dict[int, JobResult] = {}
        self._totals: dict[str, Any] = {}
        self._done_nbytes = 0
        self._nonce = uuid.uuid4().hex
        # in a list, Ray hands over the reference and not what it stands for
        self._shared = [ray.put(self._in_common(plan, outputs))]

    def _in_common(self, plan: Plan, outputs: Sequence[OutputFile]) -> Shared:
        bare = replace(plan, jobs=[], outputs=[], copies=[], ledger=[], mixes=[], texts={})
        remotes: dict[str, RemoteFile] = {}
        places = []
        for path in replace(plan, copies=[]).files():
            remote = remote_of(path)
            if remote is not None:
                remotes[path] = remote
            places.append(path if remote is not None and remote.ranged else local_path(path))
        return Shared(
            bare,
            [file.path for file in outputs],
            remotes,
            fingerprints(places),
            versions(),
            self._scratch,
            self._nonce,
            None if self._writer is None else self._writer.sizes.shape,
        )

    def run(self) -> Found:
        self._prove()
        while self._ended < len(self._batches):
            self._fill()
            self._collect()
        return Found([self._results[number] for number in range(len(self._jobs))], self._totals)

    def stop(self) -> None:
        """Cancel what is in flight and wait for its end: nothing is to write afterwards."""
        for force in (False, True):
            for reference in self._flight:
                self._ray.cancel(reference, force=force)
            if self._flight:
                flight = list(self._flight)
                _, left = self._ray.wait(flight, num_returns=len(flight), timeout=GRACE_SECONDS)
                self._flight = {reference: self._flight[reference] for reference in left}

    def _prove(self) -> None:
        """Let every node look at the driver's files; one that is just lost is passed over."""
        affinity = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        if self._scratch is not None:
            Path(self._scratch, "driver").write_text(self._nonce)
        for node in _nodes(self._ray):
            place = {"num_cpus": 0, "scheduling_strategy": affinity(node["NodeID"], soft=False)}
            self._submit("the proof", partial(self._proved, node), place, receive_shared)
        while self._flight:
            with contextlib.suppress(_LostError):
                self._collect()
        if not self._proven:
            raise SkillvecError("ray: no node has answered: look at `ray status`")

    def _proved(self, node: Mapping[str, Any], _: None) -> None:
        if self._scratch is not None:
            said = Path(self._scratch, node["NodeID"])
            if not said.exists() or said.read_text() != self._nonce:
                raise UsageError(
                    f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']}): what it"
                    f" writes to {self._scratch} does not come to the driver: all nodes need the"
                    " same file system at the same path"
                )
        self._proven.append(node["NodeID"])

    def _submit(
        self, what: str, then: Callable[[Any], None], options: dict[str, Any],
        work: Callable[..., Any], *arguments: Any,
    ) -> None:  # fmt: skip
        task = self._task.options(**options)
        self._flight[task.remote(self._shared, self._proven, work, *arguments)] = what, then

    def _fill(self) -> None:
        """Start tasks as far as there are workers; few batches wait for those before them."""
        spread = {"scheduling_strategy": "SPREAD"}
        while len(self._flight) < self._workers:
            if self._copies:
                number, batch, moves = self._copies.pop(0)
                then = partial(self._copied, number, batch)
                self._submit(self._name(number), then, spread, copy_ranges, batch.segment, moves)
            elif self._begun < min(len(self._batches), self._ended + AHEAD * self._workers):
                jobs = [self._jobs[number] for number in self._batches[self._begun]]
                then = partial(self._ran, self._begun)
                self._submit(self._name(self._begun), then, spread, run_batch, jobs)
                self._begun += 1
            else:
                return

    def _name(self, number: int) -> str:
        numbers = self._batches[number]
        return f"tensors {self._jobs[numbers[0]].name} to {self._jobs[numbers[-1]].name}"

    def _collect(self) -> None:
        """Take the next task that is done, or go on after a tenth of a second."""
        ready, _ = self._ray.wait(list(self._flight), timeout=0.1)
        for reference in ready:
            what, then = self._flight.pop(reference)
            then(self._value(reference, what))
        self._progress(self._done_nbytes)

    def _value(self, reference: Any, what: str) -> Any:
        """Return the result of a task, or raise its error."""
        errors = import_module("ray.exceptions")
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:  # it was raised by our code there
            raise error.cause from error
        except errors.RayError as error:
            raise _LostError(
                f"ray: {what}: the worker or node was lost in each of {1 + RETRIES} tries"
                f" ({type(error).__name__}); was it killed for want of memory? `ray status` and"
                " the logs of Ray on the nodes tell more"
            ) from None

    def _ran(self, number: int, batch: Batch) -> None:
        """Take a batch that was run; those whose turn it is get their places."""
        self._done_nbytes += sum(self._jobs[job].nbytes_read for job in self._batches[number])
        for scope, total in batch.found.totals.items():
            held = self._totals.get(scope)
            self._totals[scope] = total if held is None else held + total
        if self._writer is None:
            return self._end(number, batch)
        self._waiting[number] = batch
        while self._placed in self._waiting:
            self._place(self._writer, self._placed, self._waiting.pop(self._placed))
            self._placed += 1

    def _place(self, writer: RowWriter, number: int, batch: Batch) -> None:
        moves = []
        for row in sorted(batch.rows):
            start, *sizes, mark = batch.rows[row]
            for nbytes, (file, offset) in zip(sizes, writer.accept(row, sizes, mark), strict=True):
                if nbytes:
                    moves.append(Move(start, nbytes, file.path, offset))
                start += nbytes
        self._copies.append((number, batch, moves))

    def _copied(self, number: int, batch: Batch, _: None) -> None:
        os.unlink(batch.segment)
        self._whole[number] = batch
        while self._ended in self._whole:  # a journal's rows count up to the first gap
            self._end(self._ended, self._whole.pop(self._ended))

    def _end(self, number: int, batch: Batch) -> None:
        self._ended += 1
        for job, result in zip(self._batches[number], batch.found.results, strict=True):
            self._results[job] = result = replace(result, job=self._jobs[job])
            self._finished(job, result)
