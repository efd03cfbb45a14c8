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
from typing import Any

# old module -> where its names are, and those that are public
MODULES = {
    "skillvec.checkpoint": ("skillvec", ("Checkpoint", "open_checkpoint")),
    "skillvec.comparison": ("skillvec.verbs", ("norms", "orthogonality")),
    "skillvec.extraction": ("skillvec.verbs", ("extract_lora",)),
    "skillvec.publishing": ("skillvec.verbs", ("pull", "push")),
    "skillvec.training": ("skillvec.verbs.training", ("SkillVectorCallback",)),
    "skillvec.vector": ("skillvec.vectors.vector", ("SkillVector",)),
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
        home, public = MODULES[module.__name__]

        def answer(name: str) -> Any:
            if name.startswith("__"):  # what Python asks of every module: this one is no package
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(import_module(home), name)

        vars(module).update(
            __doc__=f"The old place of {' and '.join(public)}, which are in {home} now.",
            __all__=list(public),
            __getattr__=answer,
            __dir__=lambda: sorted({*vars(module), *public}),
        )


def answer_old_names() -> None:
    """Let `import` find the modules of MODULES; done once, by the package."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
