"""Old import paths of public names: `from skillvec.vector import SkillVector` goes on working.

Hides where the modules of version 0.1 lie now. A name of the table is found only where no file has
it, so nothing here stands in the way of a new file.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

# old module -> where its public names are
MODULES = {
    "skillvec.checkpoint": "skillvec",
    "skillvec.comparison": "skillvec.verbs",
    "skillvec.extraction": "skillvec.verbs",
    "skillvec.publishing": "skillvec.verbs",
    "skillvec.training": "skillvec.verbs.training",
    "skillvec.vector": "skillvec.vectors.vector",
}


class _Finder:
    """The last that Python asks for a module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in MODULES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        home = MODULES[module.__name__]
        module.__getattr__ = lambda name: getattr(import_module(home), name)  # type: ignore[method-assign]


def answer_old_names() -> None:
    """Let `import` find the modules of MODULES; done once, by the package."""
    sys.meta_path.append(_Finder())
