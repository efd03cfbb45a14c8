"""The fields of what `orthogonality` and `norms` report: plain data, as report.json holds it.

Typed dicts, since the facts of a report are public as dicts and are written as they are. Their keys
stand in the order of report.json; docs/orthogonality.md says what they mean, `statistics_table`
what each number of a row is.
"""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

Row = dict[str, Any]  # numbers by the keys of `statistics_table`, and what names the row


class Levels(TypedDict):
    """Rows of numbers: of all tensors, of groups of them, of each."""

    overall: Row
    parts: list[Row]  # "layers" and "outside" of them: embeddings, head, last norm
    modules: list[Row]  # each with `name`
    kinds: list[Row]
    layers: list[Row]
    tensors: Sequence[Row]  # each with `name`, `layer` ("" for none), `kind` and `module`


class VectorEntry(Levels):
    """One vector with its numbers."""

    label: str
    lineage: str  # dtypes of tuned - base


class SharedRounding(TypedDict):
    """The 16-bit checkpoint in which one delta of a pair ends and the other begins."""

    checkpoint: str
    roles: str
    cosine: float | None  # that its rounding alone gives


class ForecastLayer(TypedDict):
    """A layer, or a tensor outside of layers, in which much of a lies along b."""

    name: str
    share: float
    cosine: float | None
    z: float | None
    p: float | None
    conflict: float | None


class Forecast(TypedDict):
    """What adding a to a model that holds b meets there."""

    along: float | None
    on_support: float | None
    conflict: float | None
    in_subspace: float | None
    layers: list[ForecastLayer]
    sentence: str


class PairLevels(Levels):
    """The numbers of a pair."""

    forecast: Forecast


class PairEntry(PairLevels):
    """Two vectors with the numbers of both."""

    a: str
    b: str
    lineage_a: str
    lineage_b: str
    control: str | None
    shared_rounding: SharedRounding | None
    sentence: str


class SubspaceFacts(TypedDict):
    """How singular subspaces were asked for, and after the work how they were found."""

    k: int
    device: str
    exact: NotRequired[int]  # matrices
    randomised: NotRequired[int]
    left_out: NotRequired[int]  # tensors that are no matrices
    error: NotRequired[float]  # the largest


class ActivationFacts(TypedDict):
    """Second moments of inputs: whose they are, and how many matrices have them."""

    path: str
    model: str
    tokens: int
    device: str
    matrices: int
    without: int


class AngleFacts(TypedDict):
    """What the verbs say before anything is measured."""

    schema: int
    vectors: list[str]  # labels
    lineage: list[str]
    against: str | None
    control: str | None
    seed: int
    subspace: SubspaceFacts | None
    activations: ActivationFacts | None
    step_edges: list[float]
    output: NotRequired[str]


class AngleReport(AngleFacts):
    """The report as `to_dict` gives it; the page and the table of rows are made of it."""

    verb: str
    norms: list[VectorEntry]
    pairs: list[PairEntry]
    counts: dict[str, int]
    warnings: list[str]
    tensors: list[dict[str, Any]]
