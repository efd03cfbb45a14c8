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

    With `output`, write it there and return the opened vector; without, return it unread, to be
    subtracted where it is used. `dtype` auto is exact: base + 1 * v restores tuned bit for bit,
    whatever the dtypes; bf16, fp16 and fp32 store rounded values. `codec` auto takes the smallest.
    NaN and infinities are refused where tuned and base do not hold the same, unless
    `allow_nonfinite`: then they come back on the exact base alone. `rename` rules ("REGEX=TEXT")
    bring tuned's names to base's where no known layout does; `rows` says what happens to
    embeddings of another length (strict, common, skip). `tuned` may be a PEFT adapter of base.
    With `stream` a checkpoint on the Hub is read shard by shard, at most two of them on the disk.
    The report is the attribute `report` of what is returned. Raises UsageError,
    IncompatibleError, NonfiniteError, FormatError, OutputError.
    """
    vector = SkillVector.between(tuned, base, dtype, include, exclude, rename, rows)
    if output is None:
        if dry_run:
            raise UsageError("a dry run of diff needs an output")
        return vector
    run = Run.by(engine, workers, stream=stream, dry_run=dry_run, force=force, watcher=watcher)
    form = StoredForm("auto", codec, max_shard_size, method, notes, license, allow_nonfinite)
    return store_vector(vector, output, form, run)
