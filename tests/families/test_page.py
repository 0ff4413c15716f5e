"""The page of the models says what the sweep tests."""

from pathlib import Path

import pytest
import transformers

from tests.families.table import FAMILIES, REASONS
from tests.families.write_models import PAGE, page

TESTED = (Path(__file__).parents[2] / "constraints.txt").read_text()


@pytest.mark.skipif(f"transformers=={transformers.__version__}" not in TESTED, reason="the page is of another version")
def test_the_page_is_written_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.families.write_models`"


def test_the_table_is_large_and_gives_reasons():
    assert len(FAMILIES) >= 60
    assert len({family.kind for family in FAMILIES.values()}) >= 60
    reasons = {why for family in FAMILIES.values() for why in (family.load, family.reward, family.ppo)} - {None}
    assert reasons == set(REASONS)
