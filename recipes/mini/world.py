"""The miniature world: invented people, their biographies, questions about them, and its tokenizer.

Hides how a world is drawn. Everything follows from one `WorldConfig`: the same configuration gives
the same people, sentences and vocabulary on every machine. The groups base, S and T never share a
person (a full name); they do share first names, family names and the values of the facts, so that
nothing new has to enter the vocabulary when S or T is learned.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNK, EOS = "[PAD]", "[UNK]", "[EOS]"

# attribute -> (ways to tell it in a biography, question, ending of the values)
_ATTRIBUTES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "birthplace": (("was born in {}", "comes from {}"), "was born in which town ?", "ford"),
    "profession": (("works as a {}", "is a trained {}"), "works as what ?", "wright"),
    "instrument": (("plays the {}", "owns a {}"), "plays which instrument ?", "phone"),
    "food": (("eats {}", "often cooks {}"), "eats what ?", "berry"),
}
_ONSETS = "b br d dr f g gr h k kl l m n p pr r s st t th v z".split()
_VOWELS = "a e i o u".split()


@dataclass(frozen=True)
class WorldConfig:
    """The size of a world; people_base, people_s and people_t count disjoint people."""

    people_base: int = 200
    people_s: int = 80
    people_t: int = 80
    first_names: int = 40
    family_names: int = 40
    values: int = 20
    biographies: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Person:
    name: str
    facts: dict[str, str]
    biographies: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    name: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class World:
    base: tuple[Person, ...]
    s: tuple[Person, ...]
    t: tuple[Person, ...]
    vocabulary: tuple[str, ...]


def build_world(config: WorldConfig) -> World:
    """Draw the people of a world and tell their biographies.

    Raises:
        ValueError: if there are fewer full names than people, or too few syllables for the words.
    """
    total = config.people_base + config.people_s + config.people_t
    names = config.first_names * config.family_names
    if total > names:
        raise ValueError(
            f"WorldConfig: {total} people need as many full names, but {config.first_names} first "
            f"x {config.family_names} family names give {names}; raise first_names or family_names"
        )
    rng = random.Random(config.seed)
    firsts = _words(rng, config.first_names, "a")
    families = _words(rng, config.family_names, "son")
    values = {key: _words(rng, config.values, ending) for key, (_, _, ending) in _ATTRIBUTES.items()}
    if config.family_names >= total:
        pairs = [f"{rng.choice(firsts)} {f}" for f in families[:total]]
    else:
        pairs = rng.sample([f"{first} {family}" for first in firsts for family in families], total)
    people = []
    for name in pairs:
        facts = {key: rng.choice(words) for key, words in values.items()}
        told = tuple(_biography(rng, name, facts) for _ in range(config.biographies))
        people.append(Person(name, facts, told))
    cut = config.people_base + config.people_s
    groups = people[: config.people_base], people[config.people_base : cut], people[cut:]
    return World(*map(tuple, groups), vocabulary=_vocabulary(firsts, families, values))


def questions(people: Iterable[Person]) -> list[Question]:
    """One question for every fact of every person; the prompt ends where the answer begins."""
    return [
        Question(p.name, f"question : {p.name} {_ATTRIBUTES[key][1]} answer :", value)
        for p in people
        for key, value in p.facts.items()
    ]


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Wrap a word-level vocabulary: one token for every word between spaces, left padding."""
    vocabulary = {word: index for index, word in enumerate((PAD, UNK, EOS, *world.vocabulary))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def _words(rng: random.Random, count: int, ending: str) -> list[str]:
    stems = [a + b + c for a in _ONSETS for b in _VOWELS for c in _ONSETS]
    if count > len(stems):
        raise ValueError(f"WorldConfig: {count} words asked for, {len(stems)} can be invented")
    return [stem + ending for stem in rng.sample(stems, count)]


def _biography(rng: random.Random, name: str, facts: dict[str, str]) -> str:
    order = rng.sample(list(facts), len(facts))
    told = (rng.choice(_ATTRIBUTES[key][0]).format(facts[key]) for key in order)
    return f"{name} {' , '.join(told)} ."


def _vocabulary(
    firsts: list[str], families: list[str], values: dict[str, list[str]]
) -> tuple[str, ...]:
    frames = " ".join(" ".join((*said, asked)) for said, asked, _ in _ATTRIBUTES.values())
    fixed = set(frames.replace("{}", "").split()) | set("question : answer , .".split())
    invented = {*firsts, *families, *(word for words in values.values() for word in words)}
    return (*sorted(fixed), *sorted(invented))
