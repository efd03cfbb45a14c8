"""Invented people and tools in plain English: texts that tell about them, and questions.

Hides how a world is drawn. The same seed gives the same subjects, sentences and questions on every
machine. Every subject's name is invented and belongs to one group alone, S (the source) or T (the
target); the values of facts are everyday words, and both groups draw from the same ones. A person
lives in a city, has a job, plays an instrument and keeps an animal; a tool opens, saves, searches
and removes something, each by a call such as `load(path)`, of which the function and its argument
have to be known. No text holds a question, and no question has the words of a text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# as the instruct model was trained to be asked, without the system message that its template adds
PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: how texts tell it, how it is asked for in two wordings, what it may be."""

    told: tuple[str, ...]
    asked: tuple[str, str]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """A person or a tool: a name and one value for every attribute."""

    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Domain:
    """The attributes of a kind of subjects, and two groups of subjects that share no name."""

    attributes: Mapping[str, Attribute]
    s: tuple[Subject, ...]
    t: tuple[Subject, ...]

    def texts(self, subjects: Iterable[Subject], count: int, seed: int) -> list[dict[str, str]]:
        """Tell all facts of every subject, `count` times in orders and wordings that are drawn."""
        drawn = random.Random(seed)
        rows = []
        for subject in subjects:
            for _ in range(count):
                keys = drawn.sample([*subject.facts], len(subject.facts))
                said = [drawn.choice(self.attributes[key].told).format(subject.facts[key])
                        for key in keys]  # fmt: skip
                pairs = [" and ".join(said[at : at + 2]) for at in range(0, len(said), 2)]
                rows.append({"text": " ".join(f"{subject.name} {pair}." for pair in pairs)})
        drawn.shuffle(rows)
        return rows

    def questions(self, subjects: Iterable[Subject]) -> list[dict[str, str]]:
        """Ask for every fact of every subject in both wordings, subject by subject."""
        return [
            {
                "prompt": PROMPT.format(question=wording.format(subject.name)),
                "answer": value,
                "group": subject.name,
                "key": key,
                "wording": str(number),
                "told": f"{subject.name} {self.attributes[key].told[0].partition('{}')[0].strip()}",
            }
            for subject in subjects
            for key, value in subject.facts.items()
            for number, wording in enumerate(self.attributes[key].asked)
        ]


def build_world(seed: int, subjects: int) -> dict[str, Domain]:
    """Draw the domains `people` and `tools`, with so many subjects in each of S and T.

    Raises ValueError for more subjects than there are names.
    """
    drawn = random.Random(seed)
    most = len(FIRST_NAMES) // 2
    if not 1 <= subjects <= most:
        raise ValueError(f"subjects: expected 1 to {most}, found {subjects}")
    firsts = drawn.sample(FIRST_NAMES, 2 * subjects)
    families = _invent(drawn, 2 * subjects, FAMILY_ENDS)
    people = [f"{first} {family}" for first, family in zip(firsts, families, strict=True)]
    return {
        "people": _draw(drawn, people, PEOPLE),
        "tools": _draw(drawn, _invent(drawn, 2 * subjects, TOOL_ENDS), TOOLS),
    }


def _draw(drawn: random.Random, names: list[str], attributes: Mapping[str, Attribute]) -> Domain:
    subjects = [Subject(name, {key: drawn.choice(one.values) for key, one in attributes.items()})
                for name in names]  # fmt: skip
    half = len(subjects) // 2
    return Domain(attributes, (*subjects[:half],), (*subjects[half:],))


def _invent(drawn: random.Random, count: int, ends: tuple[str, ...]) -> list[str]:
    return drawn.sample([start + end for start in STARTS for end in ends], count)


def _calls(functions: str, arguments: str) -> tuple[str, ...]:
    return tuple(f"{name}({one})" for name in functions.split() for one in arguments.split())


FIRST_NAMES = (
    "Adam", "Alice", "Amy", "Anna", "Ben", "Carl", "Clara", "Daniel", "David", "Diana", "Emily",
    "Emma", "Eric", "Eva", "Frank", "Fred", "George", "Grace", "Hannah", "Harry", "Helen", "Henry",
    "Ivan", "Jack", "Jacob", "James", "Jane", "Jason", "John", "Julia", "Karen", "Kate", "Kevin",
    "Laura", "Leo", "Linda", "Lisa", "Louis", "Lucy", "Maria", "Mark", "Martin", "Mary", "Max",
    "Michael", "Nina", "Oliver", "Oscar", "Paul", "Peter", "Philip", "Rachel", "Robert", "Rose",
    "Ruth", "Sam", "Sarah", "Simon", "Sophie", "Thomas", "Tom", "Victor", "Walter", "William",
)  # fmt: skip
STARTS = ("Bel", "Bren", "Cal", "Cor", "Dal", "Dor", "Fal", "Fen", "Gal", "Hol", "Jor", "Kel",
          "Lor", "Mar", "Nor", "Pel", "Ros", "Tal", "Vel", "Wen")  # fmt: skip
FAMILY_ENDS = ("drake", "field", "gate", "kin", "man", "mere", "more", "ster", "ton", "well")
TOOL_ENDS = ("base", "bit", "box", "desk", "flow", "grid", "hub", "kit", "link", "sync")

PEOPLE = {
    "city": Attribute(
        ("lives in {}", "has a home in {}", "moved to {}"),
        ("In which city can {} be visited?", "Which city is {} found in?"),
        ("Amsterdam", "Athens", "Berlin", "Boston", "Brussels", "Cairo", "Chicago", "Dublin",
         "Geneva", "Lisbon", "London", "Madrid", "Moscow", "Oslo", "Paris", "Prague", "Rome",
         "Sydney", "Tokyo", "Vienna"),
    ),
    "job": Attribute(
        ("works as a {}", "is a trained {}", "earns money as a {}"),
        ("What is the profession of {}?", "What does {} do for a living?"),
        ("baker", "banker", "barber", "butcher", "carpenter", "chemist", "cook", "dancer",
         "dentist", "doctor", "driver", "farmer", "lawyer", "librarian", "nurse", "painter",
         "pilot", "sailor", "teacher", "writer"),
    ),
    "instrument": Attribute(
        ("plays the {}", "practices the {}", "performs on the {}"),
        ("Which musical instrument does {} know?", "What instrument would {} bring to a concert?"),
        ("accordion", "banjo", "bass", "bell", "cello", "clarinet", "drum", "fiddle", "flute",
         "guitar", "harp", "horn", "keyboard", "lute", "organ", "piano", "trumpet", "tuba",
         "viola", "violin"),
    ),
    "animal": Attribute(
        ("keeps a {}", "owns a {}", "feeds a {}"),
        ("Which animal does {} look after?", "What kind of pet belongs to {}?"),
        ("bear", "bird", "camel", "cat", "chicken", "cow", "dog", "donkey", "fish", "fox", "frog",
         "goat", "horse", "lion", "monkey", "pig", "rabbit", "sheep", "snake", "tiger"),
    ),
}  # fmt: skip

TOOLS = {
    "open": Attribute(
        ("opens a file with {}", "reads from disk with {}", "takes input by {}"),
        ("Which call of {} loads a document?", "How is a document brought into {}?"),
        _calls("load open read fetch", "path file name url id"),
    ),
    "save": Attribute(
        ("saves work with {}", "writes results with {}", "stores changes by {}"),
        ("Which call of {} keeps what was done?", "How is progress preserved in {}?"),
        _calls("save write store put", "data text copy draft state"),
    ),
    "search": Attribute(
        ("searches with {}", "finds entries with {}", "looks things up by {}"),
        ("Which call of {} locates an item?", "How is something located in {}?"),
        _calls("find search query scan", "word term key tag phrase"),
    ),
    "remove": Attribute(
        ("removes items with {}", "cleans up with {}", "deletes entries by {}"),
        ("Which call of {} gets rid of an item?", "How is something thrown away in {}?"),
        _calls("drop delete clear remove", "item row entry line node"),
    ),
}
