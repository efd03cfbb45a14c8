"""Fixtures shared by all tests; what they import is in tests/support."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import perturbed, save, toy
from hypothesis import settings

# derandomized: a run that fails here fails everywhere; no deadline: the machine may be busy
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
# readline, which pytest imports, tells all that it starts of 80 columns, in which sentences would
# be folded by the length of a path; without, nothing is folded where there is no terminal
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")
# what is imported and collected stays: to look through it for garbage took a tenth of the time
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Let each worker begin with other files: all are compiled, and their asserts rewritten, once.

    The first time, that is half of what it takes to collect.
    """
    worker = getattr(config, "workerinput", None)
    if worker and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        places = sorted(str(path) for name in config.args for path in Path(name).iterdir()
                        if path.is_dir() or path.name.startswith("test_"))  # fmt: skip
        first = len(places) * int(worker["workerid"][2:]) // worker["workercount"]
        config.args[:] = places[first:] + places[:first]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path)  # the same for all workers


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _freeze_what_is_there() -> None:
    """Keep trainings, which collect garbage themselves, from looking through all of a session."""
    gc.collect()
    gc.freeze()


class Family(NamedTuple):
    """Folders of one model family: base, tuned (sparse RL-like), sft (dense) and a target."""

    base: Path
    tuned: Path
    sft: Path
    target: Path


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """BF16 toys, read-only for all tests of the session; the target lies in three shards."""
    folder = tmp_path_factory.mktemp("family")
    base = toy(0)
    return Family(
        save(folder / "base", base),
        save(folder / "tuned", perturbed(base, 1, density=0.2)),
        save(folder / "sft", perturbed(base, 2)),
        save(
            folder / "target",
            perturbed(base, 3),
            shards=3,
            side_files={"tokenizer.json": "{}", "notes.txt": "kept byte for byte\n"},
        ),
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices are slower on many threads of torch, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
