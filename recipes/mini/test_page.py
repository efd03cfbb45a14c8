"""The page of the miniature."""

from pathlib import Path

import pytest
from claim_seeds import GOOD, make_results

from skillvec.recipes.claims import rules
from skillvec.recipes.claims.rules import judge
from skillvec.recipes.mini.claims import CLAIMS
from skillvec.recipes.mini.page import write_page
from skillvec.recipes.mini.results import gather


def test_the_page_and_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert")
    page = tmp_path / "docs" / "reproduction.md"
    page.parent.mkdir()
    found = make_results(**GOOD, rank_4=0.7)
    write_page(found, None, found.seeds, page)
    text = page.read_text()
    assert "Each of 12 seeds (8, 9, 10," in text
    assert "{" not in text and "nan" not in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1 and len(rows) > 2
    assert len(tables) == 24
    parts = [part for make in CLAIMS for part in make(found).parts]
    shown = [row.split(" | ") for row in tables[0][2:]]
    assert [(row[2], row[5], row[6]) for row in shown] == [
        (f"**{verdict.word}**", rules.show_p(verdict.p_for), rules.show_p(verdict.p_against))
        for verdict in judge(parts)
    ]
    for title in (make(found).title for make in CLAIMS):
        assert f". {title}\n" in text
    # rank 4 gives .7 where v gives .8 and SFT only .3
    assert "| rank 4 of v's layers | 64% / 64% | 0.700 ± 0.007 | 80% |" in text
    assert "| layers of v alone | 25% / 25% |" in text
    assert "| outside of the layers alone | 75% / 75% |" in text
    for name in ("lambda", "arms", "layers", "forgetting"):
        assert (page.parent / "images" / f"{name}.svg").read_text().startswith("<svg")
        assert f"images/{name}.svg" in text
    monkeypatch.setattr("skillvec.recipes.mini.page.render", lambda _: [])  # drawn already
    write_page(found, make_results(lambda_1=0.6), found.seeds, page)
    assert "| people | 0.300 ± 0.007 | 0.600 ± 0.007 |" in page.read_text()


def test_a_page_wants_finished_seeds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed-8: start is not done"):
        gather(tmp_path, [8], "mini")
