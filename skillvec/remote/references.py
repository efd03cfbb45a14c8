"""What is written like a place elsewhere: references to the Hub, URLs of object stores.

Asks nobody and imports neither client, so that a run on this disk can tell a path from both.
"""

import re
from typing import NamedTuple
from urllib.parse import unquote

from skillvec.remote.files import is_plain

SCHEME = "hf://"
SHORT = re.compile(r"([^/@]+/[^/@]+)(?:@([^@]+))?")
LONG = re.compile(r"([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(.+?))?/?")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.+", re.DOTALL)
COMMIT = re.compile("[0-9a-f]{40}")


class Reference(NamedTuple):
    """What a user wrote: revision None for the default branch, member None for the repository."""

    repo: str
    revision: str | None
    member: str | None

    def pinned(self, commit: str) -> str:
        """Return the reference to this at a commit."""
        whole = f"{self.repo}@{commit}"
        return f"{SCHEME}{whole}/{self.member}" if self.member else whole


def parse(ref: str) -> Reference | None:
    """Return what a reference to the Hub says, None for what cannot be one."""
    text = ref.removeprefix(SCHEME)
    found = (SHORT if text == ref else LONG).fullmatch(text)
    if found is None or not REPO.fullmatch(found[1]):
        return None
    revision, member = (*found.groups(), None)[1:3]
    if revision is not None and text != ref:
        revision = unquote(revision)
    # the cache makes file names of both
    plain = all(is_plain(name) for name in (revision, member) if name is not None)
    return Reference(found[1], revision, member) if plain else None


def is_of_hub(text: str) -> bool:
    """Return whether text is written like a model on the Hub; a path that exists comes before."""
    return text.startswith(SCHEME) or parse(text) is not None


def pinned(text: str) -> tuple[str, str] | None:
    """Return repository and commit of a reference that names a commit, as all that are recorded."""
    asked = parse(text)
    if asked is None or asked.revision is None or not COMMIT.fullmatch(asked.revision):
        return None
    return asked.repo, asked.revision


def is_recorded(text: str) -> bool:
    """Return whether a record says by text that it was read of the Hub: with commit or scheme."""
    return text.startswith(SCHEME) or pinned(text) is not None


def may_be(recorded: str, said: str) -> bool:
    """Return whether a reference with its commit is that of what a user wrote, the same or not."""
    one, other = parse(recorded), parse(said)
    same = one and other and (one.repo, one.member) == (other.repo, other.member)
    return bool(same) and pinned(recorded) is not None


def is_url(text: str) -> bool:
    """Return whether text is a URL, the Hub's too; it is then no path of this disk."""
    return URL.fullmatch(text) is not None


def is_of_store(text: str) -> bool:
    """Return whether text is a URL of an object store: of any scheme but the Hub's."""
    return is_url(text) and not text.startswith(SCHEME)
