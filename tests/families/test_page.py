"""The page of the models says what the sweep tests."""

from tests.families.table import FAMILIES, REASONS
from tests.families.write_models import PAGE, page


def test_the_page_is_written_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.families.write_models`"


def test_the_table_is_large_and_gives_reasons():
    assert len(FAMILIES) >= 60
    assert len({family.kind for family in FAMILIES.values()}) >= 60
    reasons = {why for family in FAMILIES.values() for why in (family.load, family.reward, family.ppo)} - {None}
    assert reasons == set(REASONS)
