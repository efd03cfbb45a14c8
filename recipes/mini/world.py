"""The miniature world: invented people and APIs, texts that tell about them, questions, tokenizer.

Hides how a world is drawn. Everything follows from one `WorldConfig`: the same configuration gives
the same subjects, sentences and vocabulary on every machine. There are two domains. Every person
has a family name and every API a name of its own, one word of the vocabulary, so base, S and T
never share a subject; within a domain they share the values of the facts and the wordings, which
base has seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNK, EOS = "[PAD]", "[UNK]", "[EOS]"
GROUPS = ("base", "s", "t")

# attribute -> (two ways to tell it, ending of the values); a question names the attribute by a
# word that no text uses, so answering needs more than going on with a sentence
_PEOPLE: dict[str, tuple[tuple[str, str], str]] = {
    "birthplace": (("was born in {}", "comes from {}"), "ford"),
    "profession": (("works as a {}", "is a trained {}"), "wright"),
    "instrument": (("plays the {}", "owns a {}"), "phone"),
    "food": (("eats {}", "often cooks {}"), "berry"),
}
_APIS: dict[str, tuple[tuple[str, str], str]] = {
    "input": (("takes a {}", "wants one {}"), "id"),
    "output": (("returns the {}", "gives back a {}"), "list"),
    "server": (("runs on {}", "is served by {}"), "net"),
    "secret": (("asks for {}", "is unlocked with {}"), "key"),
}
_QUESTION = "question : {key} of {name} ? answer :"
_TASK = "task : needs {key} of {name} ! action :"
# single letters and pairs that start an invented syllable, or end one
_CONSONANTS = (*"bdfghklmnprstvz", "br", "dr", "gr", "kl", "pr", "st", "th")


@dataclass(frozen=True)
class WorldConfig:
    """The size of a world: subjects in each group of a domain, words to draw from, texts each."""

    base: int = 200
    s: int = 80
    t: int = 80
    first_names: int = 40
    values: int = 20
    texts: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """A person or an API: its name, one value for every attribute, texts that tell all of them."""

    name: str
    facts: Mapping[str, str]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """What is asked about one fact of one subject; the prompt ends where the answer begins.

    `told` is the beginning of a sentence, as the subject's texts have it, that the value ends.
    """

    name: str
    key: str
    prompt: str
    answer: str
    told: str
    value: str


@dataclass(frozen=True)
class Domain:
    """Three disjoint groups of subjects and how one asks about them."""

    base: tuple[Subject, ...]
    s: tuple[Subject, ...]
    t: tuple[Subject, ...]
    prompt: str
    answer: str
    wordings: Mapping[str, str]

    def questions(self, subjects: Iterable[Subject]) -> list[Question]:
        """Ask for every fact of every subject, subject by subject."""
        return [
            Question(
                subject.name,
                key,
                self.prompt.format(key=key, name=subject.name),
                self.answer.format(key=key, name=subject.name, value=value),
                f"{subject.name} {self.wordings[key].partition(' {}')[0]}",
                value,
            )
            for subject in subjects
            for key, value in subject.facts.items()
        ]


@dataclass(frozen=True)
class World:
    """Both domains and every word that is ever said about them."""

    domains: Mapping[str, Domain]
    vocabulary: tuple[str, ...]


def build_world(config: WorldConfig) -> World:
    """Draw the subjects of a world and tell about them.

    Raises:
        ValueError: if more words of a kind are asked for than can be invented.
    """
    rng = random.Random(config.seed)
    total = config.base + config.s + config.t
    firsts = _invent(rng, "first names", config.first_names, "a")
    families = _invent(rng, "family names (one a person)", total, "son")
    people = [f"{rng.choice(firsts)} {family}" for family in families]
    apis = _invent(rng, "names of APIs", total, "api")
    domains = {
        "people": _draw(rng, config, people, _PEOPLE, _QUESTION, "{value}"),
        "apis": _draw(rng, config, apis, _APIS, _TASK, "call {value} end"),
    }
    words = set()
    for domain in domains.values():
        for subject in (*domain.base, *domain.s, *domain.t):
            words.update(*(text.split() for text in subject.texts))
        for question in domain.questions(domain.base):
            words.update(question.prompt.split(), question.answer.split())
    return World(domains, tuple(sorted(words)))


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


def _draw(
    rng: random.Random,
    config: WorldConfig,
    names: list[str],
    attributes: dict[str, tuple[tuple[str, str], str]],
    prompt: str,
    answer: str,
) -> Domain:
    values = {
        key: _invent(rng, f"values of {key}", config.values, ending)
        for key, (_, ending) in attributes.items()
    }
    subjects = []
    for name in names:
        facts = {key: rng.choice(words) for key, words in values.items()}
        texts = tuple(_tell(rng, name, facts, attributes) for _ in range(config.texts))
        subjects.append(Subject(name, facts, texts))
    first_s, first_t = config.base, config.base + config.s
    wordings = {key: told[0] for key, (told, _) in attributes.items()}
    groups = (subjects[:first_s], subjects[first_s:first_t], subjects[first_t:])
    return Domain(*map(tuple, groups), prompt, answer, wordings)


def _tell(
    rng: random.Random,
    name: str,
    facts: dict[str, str],
    attributes: dict[str, tuple[tuple[str, str], str]],
) -> str:
    order = rng.sample(list(facts), len(facts))
    told = (rng.choice(attributes[key][0]).format(facts[key]) for key in order)
    return f"{name} {' , '.join(told)} ."


def _invent(rng: random.Random, kind: str, count: int, ending: str) -> list[str]:
    stems = [
        start + vowel + end for start in _CONSONANTS for vowel in "aeiou" for end in _CONSONANTS
    ]
    if count > len(stems):
        raise ValueError(f"WorldConfig: {count} {kind} asked for, at most {len(stems)} exist")
    return [stem + ending for stem in rng.sample(stems, count)]
