"""Command lines of skillvec in a process without the extras: those of stdin, one a line.

`light_install.py [PACKAGE ...]` makes imports of these packages fail, as if none were installed.
Prints JSON: for each line its exit code and what it said, and which of the packages came in.
"""

import json
import shlex
import sys
import traceback
from types import ModuleType

PACKAGES = sys.argv[1:]


class Missing:
    """The first finder of modules: it finds that the packages are not there."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing)  # type: ignore[arg-type]

from click.testing import CliRunner  # noqa: E402

import skillvec  # noqa: E402
from skillvec.cli.commands import main  # noqa: E402

done = []
for line in sys.stdin:
    result = CliRunner().invoke(main, shlex.split(line))
    error = result.exception
    said = result.output
    if error is not None and not isinstance(error, SystemExit):
        said += "".join(traceback.format_exception(error))
    done.append([result.exit_code, said])
try:
    callback = str(skillvec.SkillVectorCallback)
except skillvec.UsageError as refused:
    callback = str(refused)
print(json.dumps([done, callback, sorted(set(PACKAGES) & set(sys.modules))]))
