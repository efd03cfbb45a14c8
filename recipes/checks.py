"""Everything that can be found wrong before the first stage runs, all of it in one answer.

Hides where each fault would have shown itself: in a training that starts after hours, or at the end
of it. Nothing is written (but for the Hub's caches), no model is loaded, no accelerator is touched,
no judge is asked. What a stage of `prepare` makes is looked at as soon as it is there, before
anything is trained on it.
Not covered: what only the model can tell (memory, prompts too long for it), data sets and models
that a module fetches from the Hub by itself, and whether a judge or a tool server answers.

A module may take part: `build_parser()` returns the argparse parser of its `main`, by which its
options are checked, and `check(options)` raises ValueError for what is wrong with them and with the
files that they name.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skillvec.errors import SkillvecError, needs
from skillvec.recipes.dry_run import disk_of
from skillvec.recipes.launch import count_processes, launch_words
from skillvec.recipes.stages import TRAINERS, Pipeline, Stage, in_the_way, maker, states
from skillvec.recipes.training import (
    FILES,
    check_columns,
    fetch_model,
    find_missing,
    load_function,
    load_rows,
)

if TYPE_CHECKING:
    from skillvec.recipes.past import Config

SFT, GRPO = TRAINERS
# what GRPOTrainer gives every reward function besides the columns
GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


class FaultsError(ValueError):
    """Several things that are wrong, each a sentence."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = list(dict.fromkeys(faults))
        super().__init__("\n".join(self.faults))


def require_training() -> None:
    """Import what trains; UsageError names the extra where something is missing."""
    with needs("train", "a pipeline"):
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl  # noqa: F401


def find_faults(config: Config, line: Pipeline) -> list[str]:
    """Return everything that is wrong, apart from rows, with what there is to do."""
    found = states(line)
    to_do = [stage for stage, state, _ in found if state != "done"]
    trains = any(stage.settings is not None for stage in to_do)
    faults = setting_faults(config) if trains else []
    for stage in to_do:
        faults += _option_faults(line, stage)[0]
        if missing := _missing_files(line, stage):
            shown = ", ".join(missing[:5]) + (
                f" and {len(missing) - 5} more" if missing[5:] else ""
            )
            faults.append(f"{_label(line, stage)}: no such file, and no stage makes it: {shown}")
    if maker(line, None, line.base) is None and any(line.base in stage.reads for stage in to_do):
        faults += base_faults(line.base)
    for stage, state, changed in found:
        if state == "to do" and (blocked := in_the_way(line, stage, changed)):
            faults.append(blocked)
    return faults + _disk_faults(line, to_do)


# ------------------------------------------------------------------------------ trainings' settings


def setting_faults(config: Config) -> list[str]:
    """Return what TRL's argument classes refuse of `training`, `sft`, `rl` and `prepare`."""
    try:
        launch_words(config.launch, config.processes)
    except ValueError as error:
        return [_text(error)]
    processes = count_processes(config.launch, config.processes)
    from skillvec.recipes.trl_arguments import classes_of, contradiction, names_of

    sections = [(f"sft, step {k}", SFT, step) for k, step in enumerate(config.sft, 1)]
    sections.append(("rl", GRPO, config.rl))
    for number, entry in enumerate(config.prepare, 1):
        if entry["run"] in TRAINERS:
            sections.append((f"prepare {number}", entry["run"], entry.get("with", {})))
    everywhere = set().union(*(names_of(classes_of(module)) for module in TRAINERS))
    faults: list[str] = []
    together: dict[str, list[str]] = {}
    for place, module, own in sections:
        whole = {**config.training, **own}
        found = _section_faults(place, module, own, config.training, everywhere)
        faults += found
        always = {"data": "rows.jsonl", "model_name_or_path": "base", "output_dir": "out"}
        if not found and (why := contradiction(module, {**always, **whole}, processes)):
            together.setdefault(why, []).append(place)
    faults += [f"{'; '.join(places)}: {why}" for why, places in together.items()]
    rewards = config.rl.get("rewards") or []
    if not rewards:
        faults.append("rl: expected at least one reward, `rewards: [module:function]`")
    for name in rewards if isinstance(rewards, list) else ():
        faults += _function_faults(name, is_reward=True)
    if config.rl.get("environments"):
        faults += _function_faults(config.rl["environments"])
    return faults


def _section_faults(
    place: str,
    module: str,
    own: Mapping[str, Any],
    training: Mapping[str, Any],
    everywhere: set[str],
) -> list[str]:
    from skillvec.recipes import trl_arguments as arguments

    classes = arguments.classes_of(module)
    known = arguments.names_of(classes)
    whole = {**training, **own}
    faults = []
    for name in whole:
        source = place if name in own else "training"
        if name in known:
            given = name in arguments.OF_THE_PIPELINE and not place.startswith("prepare")
            if given:
                faults.append(f"{source}: `{name}` is what the pipeline sets; leave it out")
        elif name in everywhere:
            of = "" if name in own else ", which `training` gives to every training"
            faults.append(f"{place}: `{name}`{of}: {module} does not know it")
        else:
            near = arguments.nearest(name, known)
            faults.append(f"{source}: nothing is called `{name}`{near}")
    for name, fault in arguments.value_faults(classes, whole).items():
        faults.append(f"{place if name in own else 'training'}: `{name}`: {fault}")
    return faults + [f"{place}: {missing}" for missing in find_missing(whole)]


def _function_faults(name: Any, is_reward: bool = False) -> list[str]:
    try:
        parameters = _parameters(str(name))
    except Exception as error:  # whatever the module of a user raises while it is imported
        return [f"rl: {_text(error)}"]
    if is_reward and not any(one.kind is one.VAR_KEYWORD for one in parameters):
        return [f"rl: {name}: expected **kwargs at its end: TRL gives it more than the columns"]
    return []


def _parameters(name: str) -> Collection[inspect.Parameter]:
    return inspect.signature(load_function(name)).parameters.values()


# ---------------------------------------------------------------------------- modules and commands


def _option_faults(line: Pipeline, stage: Stage) -> tuple[list[str], Any]:
    """Return what is wrong with a stage's words, and its module's options where they are good."""
    place, (program, *words) = _label(line, stage), stage.words
    if stage.settings is not None:
        return [], None
    if program == "skillvec":
        fault = _refusal_of_command(words)
        return [f"{place}: skillvec {words[0]}: {fault}"] if fault else [], None
    try:
        module = importlib.import_module(program)
    except Exception as error:
        return [f"{place}: cannot import {program}: {_text(error)}"], None
    if not callable(getattr(module, "main", None)):
        return [f"{place}: {program} has no function `main`"], None
    if not hasattr(module, "build_parser"):
        return [], None
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return [], module.build_parser().parse_args(words)
        except SystemExit:
            return [f"{place}: {program}: {said.getvalue().rpartition('error: ')[2].strip()}"], None


def _refusal_of_command(words: Sequence[str]) -> str | None:
    import click

    from skillvec.cli.commands import main

    # click keeps what a command takes from the context above it
    whole = click.Context(main, info_name="skillvec", **main.context_settings)
    try:
        main.commands[words[0]].make_context(words[0], list(words[1:]), parent=whole)
    except click.ClickException as error:
        return error.format_message()
    return None


def _label(line: Pipeline, stage: Stage) -> str:
    return "evaluate" if stage.output in line.scores.values() else stage.name


# ---------------------------------------------------------------------------- files and their rows


def _missing_files(line: Pipeline, stage: Stage) -> list[str]:
    """Return the files that a stage reads, that are not there and that no stage makes.

    A module with a function `check` says that by itself.
    """
    if hasattr(sys.modules.get(stage.words[0]), "check"):
        return []
    wanted = [read for read in _files_of(stage) if maker(line, stage, read) is None]
    return [read for read in wanted if not Path(read).exists()]


def _files_of(stage: Stage) -> Iterator[str]:
    """Yield what a stage reads that is a file by its name, but for models and vectors."""
    if stage.settings is not None:
        if Path(str(stage.settings["data"])).suffix in FILES:
            yield str(stage.settings["data"])
    elif stage.words[0] != "skillvec":
        for read in stage.reads:
            # a/b may be an id of the Hub, a:b a function, and a sentence may hold a stroke
            is_path = read.startswith(("/", "./", "../")) or read.count("/") > 1
            is_folder = is_path and not {":", " "} & {*read}
            if "://" not in read and (is_folder or Path(read).suffix in FILES):
                yield read


class DataCheck:
    """The rows of data files of stages to do, each looked at once: when it is there to stay."""

    def __init__(self, line: Pipeline) -> None:
        self._line = line
        self._to_do = [stage for stage, state, _ in states(line) if state != "done"]
        self._seen: set[Any] = set()

    def faults(self, done: Collection[str]) -> list[str]:
        """Return what is wrong with the files that no stage makes, or one of `done` made."""
        faults: list[str] = []
        for stage in self._to_do:
            files = [*_files_of(stage)]
            data = files if stage.settings is not None else [f for f in files if not _is_model(f)]
            makers = [maker(self._line, stage, file) for file in data]
            if all(made_by is None or made_by.name in done for made_by in makers):
                faults += self._look(stage, data)
        return faults

    def _look(self, stage: Stage, data: Sequence[str]) -> list[str]:
        place = _label(self._line, stage)
        absent = [file for file in data if not Path(file).exists()]
        if not_made := [(file, maker(self._line, stage, file)) for file in absent]:
            faults = [
                f"{place}: {file} does not exist: {one.name} did not make it"
                for file, one in not_made
                if one is not None
            ]
            if faults or stage.settings is not None:
                return faults  # where no stage makes them, that is said already
        if stage.settings is not None:
            key: Any = json.dumps([stage.words[0], _of_rows(stage.settings)], sort_keys=True)
            look: Callable[[], list[str]] = lambda: _row_faults(stage)  # noqa: E731
        else:
            options = _option_faults(self._line, stage)[1]
            check = options and getattr(importlib.import_module(stage.words[0]), "check", None)
            if not check:
                return []
            given = {name: value for name, value in vars(options).items() if name != "output"}
            key = str([stage.words[0], {**given, "model": None}])
            look = lambda: _refusal(check, options)  # noqa: E731
        if key in self._seen:
            return []
        self._seen.add(key)
        return [f"{place}: {fault}" for fault in look()]


def _is_model(path: str) -> bool:
    return Path(path).suffix not in FILES


def _of_rows(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = ("data", "subset", "split", "columns", "rewards", "environments", "dataset_text_field")
    return {name: settings.get(name) for name in names}


def _refusal(check: Callable[[Any], None], options: Any) -> list[str]:
    try:
        check(options)
    except (ValueError, OSError) as error:
        return [_text(error)]
    return []


def _row_faults(stage: Stage) -> list[str]:
    """Return what is wrong with the rows of a training, for its trainer and its rewards."""
    from skillvec.recipes.trl_arguments import classes_of

    settings = stage.settings or {}
    if not isinstance(settings.get("columns", []), list):
        return []  # the argument classes said so
    data, module = str(settings["data"]), stage.words[0]
    kept = {name: settings[name] for name in ("subset", "split", "columns") if name in settings}
    rows_class = classes_of(module)[0]
    try:
        described = rows_class(data=data, **kept)
        rows = _read_jsonl(data) if data.endswith(".jsonl") else load_rows(described)
        check_columns(rows, described.columns, data)
    except Exception as error:  # of this file's rows: whatever its reader raises
        return [_text(error)]
    names = {*rows.column_names}
    if module == SFT:
        text = settings.get("dataset_text_field", "text")
        forms = ({text}, {"messages"}, {"prompt", "completion"}, {"input_ids"})
        if not any(form <= names for form in forms):
            return [f"{data}: expected `{text}`, `messages`, or `prompt` and `completion` in every"
                    f" row; found {', '.join(sorted(names))}"]  # fmt: skip
        return []
    faults = [] if "prompt" in names else [f"{data}: no column 'prompt', which GRPO asks"]
    given = names | GIVEN | ({"environments"} if settings.get("environments") else set())
    for name in settings.get("rewards", []):
        with contextlib.suppress(Exception):  # what cannot be imported is said already
            faults += _signature_faults(name, given, data)
    return faults


def _read_jsonl(path: str) -> Any:
    """Return the rows as a datasets.Dataset, without the cache that a training writes."""
    import datasets

    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, text in enumerate(lines, 1):
            try:
                row = json.loads(text) if text.strip() else None
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None
            if row is not None:
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, row {number}: expected an object, found {row!r:.40}")
                rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return datasets.Dataset.from_dict({name: [r.get(name) for r in rows] for name in names})
    except Exception as error:  # of pyarrow
        raise ValueError(f"{path}: the rows are not of one form: {error}") from None


def _signature_faults(name: str, given: set[str], data: str) -> list[str]:
    needed = [
        one.name
        for one in _parameters(name)
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if missing := [one for one in needed if one not in given]:
        return [f"{data}: no column {', '.join(map(repr, missing))}, which {name} asks for"]
    return []


# ------------------------------------------------------------------------------ base model and disk


def base_faults(base: str) -> list[str]:
    """Return what a base model lacks: a folder, or an id that the Hub or its cache must have."""
    if Path(base).is_dir():
        return _folder_faults(Path(base))
    from huggingface_hub.errors import HFValidationError

    try:
        return _folder_faults(Path(fetch_model(base, fetch=False)))
    except HFValidationError:
        return [f"base {base}: no such folder, and not an id of the Hub"]
    except OSError:
        return _hub_faults(base)


def _hub_faults(base: str) -> list[str]:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repository, _, revision = base.partition("@")
    api = huggingface_hub.HfApi()
    try:
        api.auth_check(repository)
        info = api.model_info(repository, revision=revision or None, timeout=20)
    except GatedRepoError:
        return [f"base {base}: its licence has to be accepted on the Hub, then `hf auth login`"]
    except RepositoryNotFoundError:
        return [f"base {base}: no such folder, and no such model on the Hub"]
    except Exception as error:  # offline, or no answer
        return [f"base {base}: not in the cache, and the Hub cannot be asked: {_text(error)}"]
    names = [sibling.rfilename for sibling in info.siblings or ()]
    if not any(name.endswith(".safetensors") for name in names) or "config.json" not in names:
        return [f"base {base}: expected config.json and weights in .safetensors on the Hub"]
    return []


def _folder_faults(folder: Path) -> list[str]:
    from skillvec.checkpoints.opening import open_checkpoint
    from skillvec.recipes.evaluate import load_tokenizer

    faults = []
    if not (folder / "config.json").is_file():
        faults.append(f"base {folder}: no config.json")
    try:
        open_checkpoint(folder, "base")
    except SkillvecError as error:
        faults.append(_text(error))
    try:
        load_tokenizer(str(folder))
    except Exception as error:  # transformers raises many kinds
        faults.append(f"base {folder}: no tokenizer that transformers reads: {_text(error)}")
    return faults


def _disk_faults(line: Pipeline, to_do: Sequence[Stage]) -> list[str]:
    from skillvec.analysis.wording import human_bytes

    disk = disk_of(line, to_do)
    if disk is None or disk.fits:
        return []
    need = human_bytes(disk.need + disk.checkpoints)
    return [f"{line.out}: {need} are needed at most, {human_bytes(disk.free)} are free"]


def _text(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else said[:300] + " ..."
