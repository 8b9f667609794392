"""Every causal family of the installed transformers: right, right and slower, or refused by name; and docs/models.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.slow
def test_no_family_is_wrong_and_the_page_says_what_is_found():
    families.quiet()
    found = {precision: families.sweep(list(families.models()), precision) for precision in ("fp32", "bf16")}
    wrong = {
        (precision, name): cells
        for precision, by_name in found.items()
        for name, cells in by_name.items()
        if any(cell.startswith("!") for cell in cells.values())
    }
    assert not wrong
    assert len(found["fp32"]) >= 70 and set(found["bf16"]) == set(found["fp32"])
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}:" in page:
        assert page == families.markdown(found["fp32"]), (
            "make it anew: python tests/support/families.py --markdown > docs/models.md"
        )
