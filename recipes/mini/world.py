"""The miniature world: invented people, their biographies, questions about them, its tokenizer.

Hides how a world is drawn. Everything follows from one `WorldConfig`: the same configuration gives
the same people, sentences and vocabulary on every machine. Every person has a family name of their
own, one word of the vocabulary, so base, S and T never share a person; they share first names, the
values of the facts and the wordings, which base has seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNK, EOS = "[PAD]", "[UNK]", "[EOS]"

# attribute -> (two ways to tell it in a biography, ending of the values); a question names the
# attribute by a word that no biography uses, so answering needs more than going on with a sentence
_ATTRIBUTES: dict[str, tuple[tuple[str, str], str]] = {
    "birthplace": (("was born in {}", "comes from {}"), "ford"),
    "profession": (("works as a {}", "is a trained {}"), "wright"),
    "instrument": (("plays the {}", "owns a {}"), "phone"),
    "food": (("eats {}", "often cooks {}"), "berry"),
}
# single letters and pairs that start an invented syllable, or end one
_CONSONANTS = (*"bdfghklmnprstvz", "br", "dr", "gr", "kl", "pr", "st", "th")


@dataclass(frozen=True)
class WorldConfig:
    """The size of a world: people in each group, words to draw from, biographies per person."""

    people_base: int = 200
    people_s: int = 80
    people_t: int = 80
    first_names: int = 40
    values: int = 20
    biographies: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Person:
    """A full name, one value for every attribute, and texts that tell all of them."""

    name: str
    facts: dict[str, str]
    biographies: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """What is asked about one fact of one person; the prompt ends where the answer begins."""

    name: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class World:
    """Three disjoint groups of people and every word that is ever said about them."""

    base: tuple[Person, ...]
    s: tuple[Person, ...]
    t: tuple[Person, ...]
    vocabulary: tuple[str, ...]


def build_world(config: WorldConfig) -> World:
    """Draw the people of a world and tell their biographies.

    Raises:
        ValueError: if more words of a kind are asked for than can be invented.
    """
    rng = random.Random(config.seed)
    total = config.people_base + config.people_s + config.people_t
    firsts = _invent(rng, "first names", config.first_names, "a")
    families = _invent(rng, "family names (one a person)", total, "son")
    values = {
        key: _invent(rng, f"values of {key}", config.values, ending)
        for key, (_, ending) in _ATTRIBUTES.items()
    }
    people = []
    for family in families:
        name = f"{rng.choice(firsts)} {family}"
        facts = {key: rng.choice(words) for key, words in values.items()}
        told = tuple(_biography(rng, name, facts) for _ in range(config.biographies))
        people.append(Person(name, facts, told))
    invented = {*firsts, *families, *(word for words in values.values() for word in words)}
    first_t = config.people_base + config.people_s
    return World(
        base=tuple(people[: config.people_base]),
        s=tuple(people[config.people_base : first_t]),
        t=tuple(people[first_t:]),
        vocabulary=(*sorted(_fixed_words()), *sorted(invented)),
    )


def questions(people: Iterable[Person]) -> list[Question]:
    """Ask for every fact of every person, person by person."""
    return [
        Question(person.name, f"question : {key} of {person.name} ? answer :", value)
        for person in people
        for key, value in person.facts.items()
    ]


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Make one token of every word between spaces; pads on the left, for generation."""
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


def _invent(rng: random.Random, kind: str, count: int, ending: str) -> list[str]:
    stems = [
        start + vowel + end for start in _CONSONANTS for vowel in "aeiou" for end in _CONSONANTS
    ]
    if count > len(stems):
        raise ValueError(f"WorldConfig: {count} {kind} asked for, at most {len(stems)} exist")
    return [stem + ending for stem in rng.sample(stems, count)]


def _biography(rng: random.Random, name: str, facts: dict[str, str]) -> str:
    order = rng.sample(list(facts), len(facts))
    told = (rng.choice(_ATTRIBUTES[key][0]).format(facts[key]) for key in order)
    return f"{name} {' , '.join(told)} ."


def _fixed_words() -> set[str]:
    wordings = " ".join(" ".join(told) for told, _ in _ATTRIBUTES.values())
    return {*wordings.replace("{}", "").split(), *_ATTRIBUTES, "question", "of", "answer", *":?,."}
