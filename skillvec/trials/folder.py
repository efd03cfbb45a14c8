"""The folder of a run of trials: it may be there and hold more than the run writes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from skillvec.engine.outputs import PathLike
from skillvec.errors import UsageError
from skillvec.files.output_file import explain, fsync_path
from skillvec.remote.references import is_url


def take_folder(output: PathLike, inputs: Sequence[str], marker: str, what: str) -> Path:
    """Return a folder to write to, or refuse it: one with files is taken if `marker` is there.

    `inputs` are what is read, `what` the kind of run that leaves a marker. Nothing is made.
    """
    ref = os.fspath(output)
    if not ref.strip():
        raise UsageError(f"output {ref!r}: an empty name, expected a path")
    if is_url(ref):
        raise UsageError(f"output {ref}: a {what} is written to a folder of this disk")
    folder = Path(os.path.abspath(ref))  # wherever an evaluation goes
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {ref}: exists already, and is no folder")
    here = folder.resolve()
    for name in inputs:
        for side in map(Path, name.split("::")):
            if side.exists() and side.resolve() in (here, *here.parents):
                raise UsageError(f"output {ref}: lies inside of {side}, which is read")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UsageError(f"output {ref}: exists already, and holds no {what}")
    return folder


def write_files(folder: Path, names: Sequence[str], files: Mapping[str, bytes]) -> None:
    """Write files, each whole, and remove those of `names` that an earlier run has left."""
    for name in dict.fromkeys([*names, *files]):
        path = folder / name
        made = path.with_name(f"{name}.unfinished")
        try:
            if name in files:
                made.write_bytes(files[name])
                fsync_path(os.fspath(made))
                made.replace(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise explain(error, os.fspath(path)) from None
    fsync_path(os.fspath(folder))
