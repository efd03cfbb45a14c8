"""diff: the skill vector of two checkpoints."""

from collections.abc import Sequence

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.engine.outputs import PathLike
from skillvec.engine.run import Run
from skillvec.errors import UsageError
from skillvec.report import Watcher
from skillvec.vectors.vector import SkillVector
from skillvec.verbs._save import StoredForm, store_vector


def diff(
    tuned: PathLike | Checkpoint,
    base: PathLike | Checkpoint,
    output: PathLike | None = None,
    *,
    dtype: str = "auto",
    codec: str = "auto",
    max_shard_size: int | str = "5GB",
    method: str | None = None,
    notes: str | None = None,
    license: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    rows: str = "strict",
    allow_nonfinite: bool = False,
    stream: bool = False,
    engine: str = "threads",
    workers: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> SkillVector:
    """Compute the skill vector v = tuned - base (PaST, arXiv 2601.11258, stage 2).

    `tuned` and `base` are models of the same tensors, in fp32, fp16, bf16, fp64 or quantised, each
    sharded in its own way; `tuned` may be a PEFT adapter of `base`. With `output`, a file or
    folder, write the vector there and return it opened, its report in `report`; without, return it
    unread, to be subtracted where it is used.

    `dtype` auto is exact: base + 1 * v restores tuned bit for bit, whatever the dtypes; bf16, fp16
    and fp32 store rounded values. `codec` is how they are packed (auto takes the smallest of dense,
    sparse and packed), `max_shard_size` bytes, or "5GB", above which a folder of shards is written.
    `method`, `notes` and `license` are labels for the manifest. With `allow_nonfinite`, NaN and
    infinities that tuned and base do not share come back on the exact base alone. Other options:
    help(skillvec).

    Raises UsageError, IncompatibleError naming tensors that do not match, NonfiniteError,
    FormatError, OutputError.
    """
    vector = SkillVector.between(tuned, base, dtype, include, exclude, rename, rows)
    if output is None:
        if dry_run:
            raise UsageError("a dry run of diff needs an output")
        return vector
    run = Run.by(engine, workers, stream=stream, dry_run=dry_run, force=force, watcher=watcher)
    form = StoredForm("auto", codec, max_shard_size, method, notes, license, allow_nonfinite)
    return store_vector(vector, output, form, run)
