"""An endpoint that answers by rules, to try a recipe out where no large model is at hand.

    python -m skillvec.recipes.stand_in --port 18081     # JUDGE_URL=http://localhost:18081/v1

It speaks OpenAI's chat completions and knows the prompts of these recipes: it judges, and it writes
LooGLE's question-answer pairs. Its rules are crude: an answer that shares a word with the gold
answer is right. So the code is exercised, and figures that were judged by it mean nothing. Refuses
(HTTP 422) a prompt that no recipe has, and whatever is no chat completion.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from http.server import ThreadingHTTPServer
from typing import Any

from skillvec.recipes import judges
from skillvec.recipes.local_server import JsonRequest, serve
from skillvec.recipes.loogle import pairs, reward
from skillvec.recipes.squad import judge as squad
from skillvec.recipes.toolbench import judge as toolbench

Fields = Mapping[str, str]


def same_word(right: str, wrong: str) -> Callable[[Fields], str]:
    """Return a rule that says `right` where the answer shares a word with a gold answer."""
    return lambda shown: right if judges.f1(shown["said"], shown["gold"]) else wrong


def grade_dialogue(shown: Fields) -> str:
    """Say solved where the last turn repeats a word of a result, partial where there was one."""
    results = re.findall(r'Observation: \{"error": "", "response": "(.*)', shown["said"])
    last = set(re.findall(r"\w+", shown["said"].rpartition("Action: Finish")[2]))
    if not results:
        return "unsolved"
    return "solved" if last & set(re.findall(r"\w{3,}", " ".join(results))) else "partial"


def write_pairs(shown: Fields) -> str:
    """Ask for the end of every sentence of the text."""
    told = []
    for sentence in re.split(r"(?<=[.!?])\s+", shown["text"].strip()):
        words = sentence.split()
        if len(words) > 3:
            begin, end = " ".join(words[:-2]), " ".join(words[-2:]).strip(".!?")
            about = f"How does this sentence about {shown['title']} end: {begin} ...?"
            told.append(f"Question: {about}\nEvidence: {sentence}\nAnswer: {end}")
    return "\n\n".join(told) or "There is nothing to ask."


RULES: tuple[tuple[str, Callable[[Fields], str]], ...] = (
    (judges.SAME_ANSWER, same_word("yes", "no")),
    (squad.TEMPLATE, same_word("yes", "no")),
    (reward.SAME_MEANING, same_word("True", "False")),
    (toolbench.TEMPLATE, grade_dialogue),
    (pairs.WRITE, write_pairs),
)


def answer(prompt: str) -> str:
    """Return what the rules say; ValueError for a prompt that none of the recipes has."""
    for template, rule in RULES:
        pieces = re.split(r"\{(\w+)\}", template)  # text, name, text, name, ..., text
        pattern = "".join(
            f"(?P<{piece}>.*?)" if number % 2 else re.escape(piece)
            for number, piece in enumerate(pieces)
        )
        if found := re.fullmatch(pattern, prompt, re.DOTALL):
            return rule(found.groupdict())
    raise ValueError(f"no recipe asks this: {prompt[:80]!r}")


class StandIn(ThreadingHTTPServer):
    """Serve the rules on localhost; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Request)

    @property
    def url(self) -> str:
        """Return what JUDGE_URL is set to."""
        return f"http://localhost:{self.server_address[1]}/v1"


class _Request(JsonRequest):
    def do_POST(self) -> None:  # noqa: N802
        try:
            asked = self.read_json()
            said = answer(asked["messages"][-1]["content"])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            self.send_error(422, f"expected a chat completion of a recipe: {error}")
            return
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        whole: dict[str, Any] = {"id": "-", "object": "chat.completion", "created": 0,
                                 "model": str(asked.get("model")), "choices": [choice]}  # fmt: skip
        self.send_json(whole)


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer by rules until interrupted."""
    parser = argparse.ArgumentParser("skillvec.recipes.stand_in", description=main.__doc__)
    parser.add_argument("--port", type=int, default=18081, help="%(default)s")
    given = parser.parse_args(arguments)
    try:
        server = StandIn(given.port)
    except OSError as error:
        print(f"{parser.prog}: port {given.port}: {error}", file=sys.stderr)
        return 2
    serve(server, f"answers by rules, not by a model, at {server.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
