"""What the Hub and object stores share: tries, heads, listings."""

import types
from collections.abc import Callable

import pytest

from skillvec.errors import FormatError, SkillvecError
from skillvec.remote import files
from skillvec.remote.files import HEAD_NBYTES, ReadByRange, check_listed, retry, seconds_after

CONTENT = bytes(range(251)) * 9000  # more than two heads


class Held(ReadByRange):
    address = "held://x"

    def __init__(self) -> None:
        self.nbytes, self.asked = len(CONTENT), list[tuple[int, int]]()

    def request(self, begin: int, end: int) -> bytes:
        self.asked.append((begin, end))
        return CONTENT[begin:end]


def test_the_head_is_asked_for_once_and_no_empty_range():
    file = Held()
    for begin, end in ((0, 8), (8, 500), (HEAD_NBYTES - 5, HEAD_NBYTES), (7, 7)):
        assert file.read_range(begin, end - begin) == CONTENT[begin:end]
    assert file.asked == [(0, HEAD_NBYTES)]
    over = (HEAD_NBYTES - 3, HEAD_NBYTES + 4)
    assert file.read_range(over[0], 7) == CONTENT[slice(*over)]
    assert file.read_range(len(CONTENT), 0) == b""
    assert file.asked[1:] == [(HEAD_NBYTES, HEAD_NBYTES + 4)]
    with pytest.raises(FormatError, match=f"held://x: bytes 1 to {len(CONTENT) + 1} of"):
        file.read_range(1, len(CONTENT))
    far = Held()
    assert far.read_range(HEAD_NBYTES, 4) == CONTENT[HEAD_NBYTES:][:4]
    assert far.asked == [(HEAD_NBYTES, HEAD_NBYTES + 4)]  # nothing of the head is needed


def test_small_files_at_the_root_say_what_a_model_is():
    most = files.DESCRIBING_NBYTES
    assert files.describes("config.json", most) and files.describes("LICENSE", 0)
    for name, nbytes in (("config.json", most + 1), ("below/config.json", 1), ("a.bin", 1)):
        assert not files.describes(name, nbytes)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(files, "time", types.SimpleNamespace(sleep=slept.append))
    return slept


def failing(times: int) -> Callable[[], int]:
    left = iter(range(times))

    def call() -> int:
        for number in left:
            raise OSError(str(number))
        return 7

    return call


def judge(error: Exception, failures: int) -> float:
    if failures > 3:
        raise SkillvecError(f"gave up at {error}") from None
    return seconds_after(failures)


def test_what_passes_is_tried_again_with_longer_waits(slept: list[float]):
    assert retry(failing(3), judge) == 7
    assert slept == [1, 2, 4]


def test_the_judge_ends_it(slept: list[float]):
    with pytest.raises(SkillvecError, match="gave up at 3"):
        retry(failing(9), judge)
    assert slept == [1, 2, 4]


@pytest.mark.parametrize(
    ("name", "nbytes", "said"),
    [
        ("a/../b", 1, "a file named 'a/../b': no relative path"),
        (7, 1, "a file named '7': no relative path"),
        ("a/b", -1, "a/b: the Hub says no size that can be: -1"),
        ("a/b", True, "a/b: the Hub says no size that can be: True"),
    ],
)
def test_entries_that_cannot_be_are_refused(name: object, nbytes: object, said: str):
    check_listed("base x", "a file", "the Hub", "a/b", 0)
    with pytest.raises(FormatError, match=said):
        check_listed("base x", "a file", "the Hub", name, nbytes)
