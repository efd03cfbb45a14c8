"""What is written like a place elsewhere."""

import pytest

from skillvec.remote import references


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name@v1", ("org/name", "v1", None)),
        ("org/name@feature/x", ("org/name", "feature/x", None)),
        ("hf://org/name", ("org/name", None, None)),
        ("hf://org/name/", ("org/name", None, None)),
        ("hf://org/na.me_2@v1/sub/v.safetensors", ("org/na.me_2", "v1", "sub/v.safetensors")),
        ("hf://org/name@refs/pr/3/v.safetensors", ("org/name", "refs/pr/3", "v.safetensors")),
        ("hf://org/name@feature%2Fx", ("org/name", "feature/x", None)),
    ],
)
def test_references_are_taken_apart(text: str, expected: tuple[str | None, ...]):
    assert references.is_of_hub(text)
    assert references.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["name", "./org/name", "/org/name", "~/name", "org/name/file", "org/name@../x", "org name/x",
     "org/name@", "../name", "org/..", "org/name@a\nb"],
)  # fmt: skip
def test_what_is_a_path_is_no_reference(text: str):
    assert not references.is_of_hub(text)


def test_urls_are_references_and_paths_and_the_hub_are_not():
    assert all(map(references.is_of_store, ("s3://b/x", "gs://b", "memory://x", "S3a+x.y://b")))
    others = ("hf://org/name", "org/name", "s3:/b/x", "/a://b", "c://", "a b://c", "./s3://b")
    assert not any(map(references.is_of_store, others))
    assert [references.is_url(text) for text in others] == [True] + 6 * [False]
