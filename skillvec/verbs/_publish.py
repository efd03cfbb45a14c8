"""Publishing: a vector or a merged model to the Hub in one commit, and from the Hub to this disk.

Hides what a repository gets: the files that are the vector or the model, and a card that keeps
what its owner wrote. Only what skillvec made and its own checks pass is pushed, and pulled. A
commit is made on the state of the repository that was planned on; a repository that holds other
weights is not mixed with these: a branch or a pull request has them replaced. Errors of the client
are those of `remote.hub_client`, but for what only a writer meets.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.folder import VECTOR_INDEX
from skillvec.checkpoints.opening import open_tensors
from skillvec.engine.outputs import PathLike, free_nbytes, output_model, output_vector
from skillvec.errors import (
    FormatError,
    IncompatibleError,
    SkillvecError,
    UsageError,
    printable,
    up_to_five,
)
from skillvec.files.file import Place, file_nbytes, local_path, remote_of
from skillvec.files.header import TensorSpec
from skillvec.files.official_reader import refuse_misread_files
from skillvec.files.output_file import copy_file, fsync_path
from skillvec.files.staging import staging
from skillvec.files.weight_files import is_weight_file
from skillvec.remote import hub, hub_client, references
from skillvec.remote.hub_client import README
from skillvec.report import Report, Watcher
from skillvec.vectors.provenance import read_merged
from skillvec.vectors.reader import BlockReader, VectorFile, find_vector
from skillvec.vectors.vector import SkillVector
from skillvec.verbs.card_file import BEGIN
from skillvec.verbs.cards import LICENSE, hub_model, merged_card, renewed, vector_card


@dataclass(frozen=True)
class _Made:
    """What skillvec made: a vector with its manifest, or a merged model with its recipe.

    `files` maps names in a repository to addresses.
    """

    ref: str
    files: Mapping[str, str]
    said: Mapping[str, Any]
    vector: VectorFile | None = None
    model: Checkpoint | None = None

    @property
    def kind(self) -> str:
        return "vector" if self.vector else "merged model"

    @property
    def sizes(self) -> dict[str, int]:
        return {name: file_nbytes(address) for name, address in self.files.items()}


def push(
    vector: PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Upload `vector`, or a folder that apply wrote, with a card, as one commit on the Hub.

    `repo` (org/name) is made if it is not there, public or `private`, and so is a branch
    `revision`; `create_pr` opens a pull request, with `commit_message`; `license` is for the card,
    `token` the Hub's. Objects that the Hub holds are not sent again. Raises UsageError where the
    repository holds other weights, unless a branch or a pull request replaces them, or may not be
    written. A dry run needs no token and no network: the report has the card, and says what the
    Hub could not be asked.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not references.REPO.fullmatch(repo):
        raise UsageError(f"repo {printable(repo)}: expected org/name")
    made = _made_here(vector)
    api, what, report = HfApi(token=token), f"repo {repo}", Report("push")
    state, reached = _ask(api, repo, revision, dry_run, report)
    if state and private and not state["private"]:
        raise UsageError(f"{what}: is public; make it private in its settings, or name another")
    other = _find_other(made, state, what, replace=bool(revision or create_pr))
    remote = _remote_card(api, repo, state)
    card = _card(made, repo, license, remote, api if reached else None, report)
    if made.vector and not any(line["changed"] for line in made.said["tensors"].values()):
        report.warnings.append("the vector is zero: it changes no model")
    sizes = made.sizes | {README: len(card.encode())}
    report.facts |= {
        "kind": made.kind, "path": os.fspath(vector), "repo": repo, "revision": revision,
        "private": state["private"] if state else private, "create_pr": create_pr,
        "exists": state is not None if reached else None, "files": sizes,
        "nbytes": sum(sizes.values()), "deleted": other, "url": f"{api.endpoint}/{repo}",
        "card": card,
    }  # fmt: skip
    report.facts["url"] += f"/tree/{quote(revision, safe='')}" if revision else ""
    if watcher:
        watcher.planned(report)
    if dry_run:
        return report
    if state is None:
        hub_client.written(what, lambda: api.create_repo(repo, private=private, exist_ok=True))
    if revision and not (state and state["revision"]):
        hub_client.written(what, lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=address)
        for name, address in made.files.items()
        if name != README
    ]
    operations.append(CommitOperationAdd(path_in_repo=README, path_or_fileobj=card.encode()))
    operations += [CommitOperationDelete(path_in_repo=name) for name in other]
    with _bars(shown=watcher is not None and sys.stderr.isatty()):
        done = hub_client.written(
            what,
            lambda: api.create_commit(
                repo,
                operations,
                commit_message=commit_message or f"Upload a {made.kind} with skillvec",
                revision=revision,
                create_pr=create_pr,
                parent_commit=state["commit"] if state else None,
            ),
        )
    report.facts |= {"commit": done.oid, "pull_request": done.pr_url}
    report.facts["url"] = done.pr_url or report.facts["url"]
    report.ledger = [{"name": name, "status": "uploaded", "nbytes": sizes[name]} for name in sizes]
    return report


def _find_other(
    made: _Made, state: Mapping[str, Any] | None, what: str, *, replace: bool
) -> list[str]:
    """Return the weights that the repository holds and `made` does not; refuse to replace them."""
    held = state["files"] if state else []
    other = [name for name in held if is_weight_file(name) and name not in made.files]
    if other and not replace:
        raise UsageError(
            f"{what}: holds other weights, and a repository holds one vector or model; --revision"
            f" or --create-pr replaces them in a branch or a pull request:\n{up_to_five(other)}"
        )
    return other


def pull(
    repo: str,
    output: PathLike | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Report:
    """Download a vector or a merged model to `output`, or into the Hub's cache; return where.

    `repo` is org/name, `revision` a branch, tag or commit, `token` the Hub's. Headers are read
    first, by range requests. What arrives is checked against the listing (size, sha256) and against
    its own manifest before it has the output's name. Raises IncompatibleError for what skillvec did
    not make, UsageError, FormatError, OutputError.
    """
    place = hub.locate(f"{repo}@{revision}" if revision else repo, "repo", token)
    made = _made(place)
    if made.vector is not None and VECTOR_INDEX not in made.files:  # one file, without the card
        made = replace(made, files={n: at for n, at in made.files.items() if n != README})
    out = None
    if output is not None and made.vector is not None:
        out = output_vector(output, force, SkillVector.open(place))
    elif output is not None and made.model is not None:
        out = output_model(output, force, made.model, [made.model])
    report = Report("pull", {
        "kind": made.kind, "repo": repo, "revision": place.revision, "files": made.sizes,
        "nbytes": sum(made.sizes.values()), "output": out.ref if out else os.fspath(place.path),
    })  # fmt: skip
    report.now["nbytes_free"] = free_nbytes(out.disk if out else place.path)
    if watcher:
        watcher.planned(report)
    if out is not None:  # what the cache lacks of a file may be there in part
        out.refuse_full(report.facts["nbytes"])
    if dry_run:
        return report
    report.now.clear()
    if out is None:
        hub.fetch_all(made.files.values(), watcher)
        held = [local_path(address) for address in made.files.values()]
        path = Path(held[0]) if made.vector and VECTOR_INDEX not in made.files else place.path
        _check(path, made)
        report.facts["output"] = os.fspath(path)
    else:
        with staging(out.path, force, deliver=out.delivery(force, watcher)) as stage:
            folder = stage.folder / "made"
            _fetch_into(folder, made, watcher)
            source = folder / next(iter(made.files)) if len(made.files) == 1 else folder
            _check(source, made)
            stage.publish(source)
    report.ledger = [
        {"name": name, "status": "downloaded", "nbytes": size} for name, size in made.sizes.items()
    ]
    return report


# ------------------------------------------------------------------------------------- what it is


def _made(place: Place) -> _Made:
    """Return what lies at a place, headers checked, or refuse what skillvec did not make."""
    what = f"{place.ref}: neither a skill vector nor a model that skillvec apply wrote"
    stored = find_vector(place)
    if stored is not None:
        names = {address: name for name, address in place.files.items()}
        files = {names.get(file, os.path.basename(file)): file for file in stored.files}
        if "model.safetensors" in files:
            raise UsageError(
                f"{place.ref}: a vector must not be called model.safetensors, or from_pretrained"
                " would load differences as weights: rename it"
            )
        if place.member is None:
            files |= {n: place.files[n] for n in (VECTOR_INDEX, README) if n in place.files}
        return _Made(place.ref, files, stored.manifest, vector=stored)
    opened = open_tensors(place, "repo")
    try:
        recipe = read_merged(opened)
    except UsageError:
        raise IncompatibleError(
            f"{what}; for others there is `hf upload` and `hf download`"
        ) from None
    if not opened.is_folder:
        raise UsageError(f"{place.ref}: one file of a model; a folder is pushed and pulled whole")
    files = {name: at for name, at in place.files.items() if not name.startswith(".")}
    return _Made(place.ref, files, recipe, model=opened)


def _made_here(path: PathLike) -> _Made:
    """Return what lies at a path of this disk; side tables of a vector are checked as well."""
    at = Path(os.path.abspath(Path(path).expanduser()))  # a link's own name counts
    if not at.exists():
        raise UsageError(f"vector {os.fspath(path)}: no such file or folder on this disk")
    files: dict[str, str] = {}
    if at.is_dir():
        for folder, folders, names in os.walk(at):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    file = Path(folder, name)
                    files[file.relative_to(at).as_posix()] = os.fspath(file)
    made = _made(Place(os.fspath(path), at, files))
    if made.vector is not None:
        BlockReader(made.vector)
    return made


# --------------------------------------------------------------------------------------- the Hub


def _ask(
    api: Any, repo: str, revision: str | None, dry_run: bool, report: Report
) -> tuple[dict[str, Any] | None, bool]:
    """Return the repository as it is, and whether the Hub was reached: a dry run can do without."""
    from huggingface_hub import get_token

    if dry_run and not (api.token or get_token()):
        report.warnings.append(
            f"there is no token: it is not known whether {repo} is private and whether you may"
            " write to it; push needs a token with write access (--token, HF_TOKEN or `hf auth"
            " login`)"
        )
    try:
        return _state(api, repo, revision), True
    except SkillvecError as error:
        if not dry_run:
            raise
        report.warnings.append(
            f"the Hub could not be asked: {error}. So it is not known whether {repo} exists and may"
            " be written to, whether it holds other weights (push refuses them) or a card (push"
            " keeps its text), and which licence the card of a base on the Hub names. The card that"
            " is shown is the one of a new repository"
        )
        return None, False


def _state(api: Any, repo: str, revision: str | None) -> dict[str, Any] | None:
    """Return the repository as it is, None where it is not there (or may not be seen)."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    def look(at: str | None) -> Any:
        try:
            return api.model_info(repo, revision=at, timeout=hub_client.TIMEOUT)
        except RevisionNotFoundError:
            return None
        except RepositoryNotFoundError:
            return repo

    # is there a network at all?
    info = hub_client.written(f"repo {repo}", lambda: look(revision), lost=2)
    found = info is not None
    if not found:
        info = hub_client.written(f"repo {repo}", lambda: look(None))
    if info == repo or info is None:
        return None
    files = [entry.rfilename for entry in info.siblings or ()]
    return {"commit": info.sha, "private": bool(info.private), "files": files, "revision": found}


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Let the client draw its progress bars, or none."""
    utils: Any = import_module("huggingface_hub.utils")  # its names are no typed exports
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _remote_card(api: Any, repo: str, state: dict[str, Any] | None) -> str | None:
    if state is None or README not in state["files"]:
        return None
    path = hub_client.patiently(
        f"{README} of {repo}",
        lambda: api.hf_hub_download(repo, README, revision=state["commit"]),
    )
    return _text(Path(path), f"{repo}: {README}")


def _text(path: Path, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{what}: is not UTF-8 text: mend or remove it") from None


def _card(
    made: _Made, repo: str, license: str | None, remote: str | None, api: Any, report: Report
) -> str:
    """Return the README.md to commit; what is on the Hub comes before what lies here."""
    here = _text(Path(made.files[README]), made.files[README]) if README in made.files else None
    if made.model is not None:
        if license:
            raise UsageError(
                "license: of a merged model it stands in its README.md: write it there"
            )
        local = here if here and BEGIN in here else None
        card = local or merged_card(made.said, name=repo, inherited=here)
        said = [made.said["target"], *made.said["vector"].get("parts", [made.said["vector"]])]
        refs = [part[key] for part in said for key in ("ref", "tuned", "base") if key in part]
        card = renewed(remote, card) if remote else card
    else:
        sides = [side for side in (made.said["base"], made.said["tuned"]) if side]
        refs = [side["ref"] for side in sides if not hub_model(side["ref"], side["revision"])]
        refs += [parent["ref"] for parent in made.said["parents"]]
        manifest = {**made.said, **({"license": license} if license else {})}
        carried = None if manifest["license"] else _license(api, made.said["base"], report)
        card = vector_card(manifest, name=repo, files=made.sizes, existing=remote or here,
                           license=carried)  # fmt: skip
    if paths := [printable(ref) for ref in dict.fromkeys(refs) if not hub_model(ref)]:
        report.warnings.append(
            "the header that is uploaded names its inputs as they were given; of these, paths of"
            f" this disk can be read by others:\n{up_to_five(paths)}"
        )
    if remote is not None and here is not None and here != remote:
        report.warnings.append(f"{README} on the Hub was kept, not the one in this folder")
    return card


def _license(api: Any, base: Mapping[str, Any], report: Report) -> dict[str, str]:
    """Return the licence in the card of the base, where the base is on the Hub (and that is)."""
    model = hub_model(base["ref"], base["revision"])
    if model is None or api is None:
        return {}
    try:
        info = hub_client.patiently(
            f"the card of {model}", lambda: api.model_info(model.repo, revision=model.revision)
        )
    except SkillvecError as error:
        report.warnings.append(f"no licence was carried over: {error}")
        return {}
    found = {key: info.card_data.get(key) for key in LICENSE} if info.card_data else {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


# ------------------------------------------------------------------------------------- this disk


def _fetch_into(folder: Path, made: _Made, watcher: Watcher | None) -> None:
    """Put the files into a folder under their names, each checked as it arrives."""
    total, before = sum(made.sizes.values()), 0
    for name, address in made.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        remote = remote_of(address)
        if isinstance(remote, hub.HubFile) and remote.local is None:

            def told(received: int, before: int = before) -> None:
                if watcher:
                    watcher.advanced(before + received, total)

            os.rename(remote.fetch(path.parent, told), path)
            remote.local = None  # the staging folder is not where it will lie
            fsync_path(os.fspath(path))
        else:
            copy_file(local_path(address), os.fspath(path))
        before += file_nbytes(address)


def _check(path: Path, made: _Made) -> None:
    """Raise FormatError or IncompatibleError where what arrived is not what its header said."""
    here = _made_here(path)
    if (here.kind, here.said) != (made.kind, made.said):
        raise IncompatibleError(f"{made.ref}: what arrived is not what its header said: pull again")
    held = here.vector.specs if here.vector else (here.model or {}).values()
    refuse_misread_files((s for s in held if isinstance(s, TensorSpec)), FormatError)
