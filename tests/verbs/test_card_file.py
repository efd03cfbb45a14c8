"""Metadata of cards: as the Hub's library writes it, which is asked only where it has to be."""

import random
import subprocess
import sys

from huggingface_hub import ModelCardData

from skillvec.verbs.card_file import KEYS, to_yaml

WORDS = [
    "apache-2.0", "org/name-1.2", "Q", "skill-vector", "x" * 100, "inf", "nan", "e3", "a_b", "a.",
    "yes", "NULL", "n", "On", "true", "1e3", "0x1", "a b", "-a", "2020-01-01", "\u00e9", "", "a:b",
    "a: b", "#a", "a #b", "~", "=", "<<", "a/b@c", "a\nb", "'a'", "[a]", None,
]  # fmt: skip


def test_metadata_is_written_as_by_the_library():
    draw, plain = random.Random(3), 0
    for _ in range(1500):
        few = WORDS[: draw.choice([9, len(WORDS)])]
        data = {}
        for key in draw.sample([*KEYS, "extra"], draw.randint(0, 4)):
            several = key == "tags" or (key in ("base_model", "language") and draw.random() < 0.7)
            words = [draw.choice(few) for _ in range(draw.randint(0, 3))]
            data[key] = words if several else draw.choice(few)
        expected = ModelCardData(**data).to_yaml()
        assert to_yaml(data) == expected, data
        plain += '"' not in expected and "'" not in expected
    assert plain > 300


def test_a_plain_card_takes_no_library():
    code = (
        "import sys; from skillvec.verbs.card_file import make_card\n"
        "made = make_card({'library_name': 'transformers', 'tags': ['merge', 'a']}, '# Name')\n"
        "assert made.startswith('---\\nlibrary_name: transformers\\ntags:\\n- merge\\n- a\\n---')\n"
        "assert not {'huggingface_hub', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
