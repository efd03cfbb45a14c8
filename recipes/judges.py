"""Judging answers: exact match and F1 as in SQuAD, and a language model as judge.

Hides text normalisation and all talk to an OpenAI-compatible endpoint. Invariants: an empty answer
scores 0.0 without anyone being asked; a verdict is one of the words that the judge was told to use,
found in its reply. Refuses empty answer keys. A judge that is down, refuses the key, times out or
answers nonsense raises JudgeError after bounded tries; it never becomes a zero.
"""

from __future__ import annotations

import os
import re
import string
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

YES_NO = {"yes": 1.0, "no": 0.0}
SAME_ANSWER = (
    "You grade an answer against a reference.\n\n"
    "Question: {question}\nReference answer: {gold}\nAnswer to grade: {said}\n\n"
    "Is the answer right? It is right if it fully conveys a reference answer and does not "
    "contradict it; wording and further true detail do not matter. Reply with one word: yes or no."
)
_ENVIRONMENT = ("url", "model", "key")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class JudgeError(RuntimeError):
    """The judge gave no verdict: unreachable, refused, too slow, or nonsense."""


def normalize(text: str) -> str:
    """Lower the case, drop punctuation and articles, and join words by single spaces (SQuAD)."""
    kept = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(said: str, golds: str | Sequence[str]) -> float:
    """Return 1.0 where the answer is one of the golds after normalisation, else 0.0."""
    return float(any(_words(said) == _words(gold) for gold in _key(golds) if said.strip()))


def f1(said: str, golds: str | Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, against the best gold."""
    return max(_overlap(_words(said), _words(gold)) for gold in _key(golds))


def first_word(said: str, golds: str | Sequence[str]) -> float:
    """Return 1.0 where the answer's first word is that of a gold, whatever follows."""
    return float(any(_words(said)[:1] == _words(gold)[:1] for gold in _key(golds) if said.strip()))


def contains(said: str, golds: str | Sequence[str]) -> float:
    """Return 1.0 where the words of a gold stand in the answer, one after the other."""
    words = _words(said)
    return float(any(_words(gold) == words[at : at + len(_words(gold))]
                     for gold in _key(golds) for at in range(len(words))))  # fmt: skip


def begins(said: str, golds: str | Sequence[str]) -> float:
    """Return 1.0 where the answer begins with the words of a gold, whatever follows."""
    words = _words(said)
    return float(any(_words(gold) == words[: len(_words(gold))] for gold in _key(golds)))


def ends(said: str, golds: str | Sequence[str]) -> float:
    """Return 1.0 where the answer ends with the words of a gold, whatever comes before."""
    words = _words(said)
    return float(any(_words(gold) == words[-len(_words(gold)) :] for gold in _key(golds)))


def _words(text: str) -> list[str]:
    # an answer such as "A" or "+" loses everything to normalisation: then the raw words decide
    return normalize(text).split() or text.lower().split()


def _overlap(said: list[str], gold: list[str]) -> float:
    shared = (Counter(said) & Counter(gold)).total()
    return 2 * shared / (len(said) + len(gold))


def _key(golds: str | Sequence[str]) -> list[str]:
    key = [golds] if isinstance(golds, str) else list(golds)
    if not key or not all(isinstance(gold, str) and gold.strip() for gold in key):
        raise ValueError(f"answer key: expected one or more texts, none empty; found {golds!r}")
    return key


@dataclass(frozen=True)
class Judge:
    """A language model that grades answers, behind an OpenAI-compatible endpoint.

    `template` takes {said}, and {question} and {gold} where it needs them; several golds are joined
    by " / ". `verdicts` maps the words that the template asks for to scores. `retries` bounds both
    the tries after a time-out, 429 or 5xx (with growing pauses) and the askings after a reply
    without a verdict. `timeout` is in seconds, for one try.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 60.0
    retries: int = 4
    template: str = SAME_ANSWER
    verdicts: Mapping[str, float] = field(default_factory=lambda: dict(YES_NO))
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"Judge: expected a URL with http:// or https://, found {self.url!r}")
        if "{said}" not in self.template:
            raise ValueError("Judge: the template shows no answer; put {said} into it")
        if not self.verdicts:
            raise ValueError("Judge: no verdicts; give words with their scores")

    @classmethod
    def from_environment(cls, **fields: Any) -> Judge:
        """Take url, model and key from JUDGE_URL, JUDGE_MODEL and JUDGE_KEY (may be empty)."""
        given = {
            name: os.environ.get(f"JUDGE_{name.upper()}", "") for name in _ENVIRONMENT
        } | fields
        missing = [f"JUDGE_{name.upper()}" for name in ("url", "model") if not given[name]]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} not set: set JUDGE_URL to an OpenAI-compatible endpoint, "
                "such as http://localhost:8000/v1, JUDGE_MODEL to the name of a model that it "
                "serves, and JUDGE_KEY where it wants a key"
            )
        return cls(**given)

    @cached_property
    def client(self) -> Any:
        """Open the connection pool; threads share it."""
        import openai

        return openai.OpenAI(
            base_url=self.url,
            api_key=self.key or "none",  # the client wants one; local servers ignore it
            timeout=self.timeout,
            max_retries=self.retries,
        )

    def score(self, question: str, said: str, golds: str | Sequence[str] = ()) -> float:
        """Return the score of the judge's verdict; an empty answer is 0.0 without asking.

        Raises:
            ValueError: for an empty answer key, where the template shows it.
            JudgeError: where no verdict could be had.
        """
        return self._score(question, said, golds, threading.Event())

    def _score(
        self, question: str, said: str, golds: str | Sequence[str], stopped: threading.Event
    ) -> float:
        gold = " / ".join(_key(golds)) if "{gold}" in self.template else ""
        if not said.strip():
            return 0.0
        shown = {"question": question, "gold": gold, "said": said}
        # not str.format: a template may hold other braces, such as those of JSON
        asked = re.sub(r"\{(question|gold|said)\}", lambda m: shown[m[1]], self.template)
        for attempt in range(1 + self.retries):
            if stopped.is_set():  # another question failed: nobody will read this verdict
                raise JudgeError("stopped")
            # the same question at temperature 0 would get the same nonsense again
            reply, whole = self._ask(asked, temperature=0.7 if attempt else 0.0)
            verdict = find_verdict(reply, self.verdicts) if whole else None
            if verdict is not None:
                return self.verdicts[verdict]
        cut = "" if whole else f" (cut off after {self.max_tokens} tokens: raise max_tokens)"
        raise JudgeError(
            f"judge {self.model} at {self.url}: no verdict in {1 + self.retries} replies about "
            f"{_short(question)}; expected one of {', '.join(self.verdicts)}, the last reply was "
            f"{_short(reply)}{cut}; use a judge that follows instructions, or another template"
        )

    def score_all(
        self, items: Sequence[tuple[str, str, str | Sequence[str]]], workers: int = 8
    ) -> list[float]:
        """Score (question, said, golds) concurrently, keeping order; the first error stops all."""
        pool, stopped = ThreadPoolExecutor(workers), threading.Event()
        try:
            futures = [pool.submit(self._score, *item, stopped) for item in items]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, asked: str, temperature: float) -> tuple[str, bool]:
        """Return the text of one reply, and whether it is whole: not cut off by max_tokens."""
        import openai

        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": asked}],
                temperature=temperature,
                max_completion_tokens=self.max_tokens,
            )
            choice = reply.choices[0]
            return choice.message.content or "", choice.finish_reason != "length"
        except openai.OpenAIError as error:
            raise JudgeError(self._explain(error)) from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise JudgeError(
                f"judge {self.model} at {self.url}: expected a chat completion, found something "
                f"else ({error}); JUDGE_URL usually ends in /v1"
            ) from error

    def _explain(self, error: Exception) -> str:
        status = getattr(error, "status_code", None)
        what = "no answer" if status is None else f"HTTP {status}"
        todo = {
            None: "is the server running, and fast enough?",
            401: "check JUDGE_KEY",
            403: "check JUDGE_KEY",
            404: "check JUDGE_URL (it usually ends in /v1) and JUDGE_MODEL",
        }.get(status, "see the server's log")
        if status in (None, 408, 409, 429) or status >= 500:  # those the client tries again
            what += f" in {1 + self.retries} tries of {self.timeout:g} s"
        # the client's own message leaves out what servers other than OpenAI's say
        body = getattr(getattr(error, "response", None), "text", "")
        return f"judge {self.model} at {self.url}: {what}: {_short(body or str(error))}; {todo}"


def from_environment() -> Judge:
    """Return the judge of JUDGE_URL, JUDGE_MODEL and JUDGE_KEY: right or wrong, yes or no."""
    return Judge.from_environment()


def find_verdict(reply: str, verdicts: Mapping[str, float]) -> str | None:
    """Return the one verdict of a reply, or None where there is none, or more than one.

    A last line of up to three words decides alone, so that reasoning may come first; else the whole
    reply may hold one verdict only: "yes, there is no contradiction" gives none. "Not true" says
    neither true nor false. Text between <think> tags does not count.
    """
    said = re.sub(r"(?s)^.*</think>|<think>.*$", "", reply.lower()).strip()
    lowered = {word.lower(): word for word in verdicts}
    words = "|".join(map(re.escape, sorted(lowered, key=len, reverse=True)))
    pattern = rf"(not |n['’]t )?(?<!\w)({words})(?!\w)"
    last = said.rpartition("\n")[2]
    for text in ([last] if len(last.split()) <= 3 else []) + [said]:
        found = set(re.findall(pattern, text))
        if len(found) == 1:
            negated, word = found.pop()
            return None if negated else lowered[word]
    return None


def _short(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= limit else line[:limit] + " ...")
