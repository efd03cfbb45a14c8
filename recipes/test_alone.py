"""Two processes do not run the stages of one folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from skillvec.recipes.alone import alone_in
from skillvec.recipes.stages import Pipeline, run_stages

HOLD = """
import sys, time
from pathlib import Path
from skillvec.recipes.alone import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    line = Pipeline(tmp_path / "a run", "base")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(line.out / "stages")], stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match="a run/stages: another process runs these stages"):
                run_stages(line)
        finally:
            holder.kill()  # its lock goes with it
    run_stages(line)


def test_the_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), alone_in(tmp_path / "stages"):
        raise KeyError
    with alone_in(tmp_path / "stages"):
        assert (tmp_path / "stages").is_dir()
