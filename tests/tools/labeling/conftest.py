"""Items, and databases of them."""

import pytest

from rlhf_recipes.tools.labeling.database import create
from rlhf_recipes.tools.labeling.records import Item
from rlhf_recipes.tools.labeling.store import Store


def pairs(number, **aside):
    rows = [{"prompt": f"q{n}", "completions": [f"good {n}", f"bad {n}"], "row": n} for n in range(number)]
    return [Item(row, **aside) for row in rows]


@pytest.fixture
def opened(tmp_path):
    """Make a database of items, open it, and close it in the end."""
    stores = []

    def open_store(items, name="labels.sqlite", seed=0, **options):
        path = tmp_path / name
        if not path.exists():
            create(path, items, source="pairs.jsonl", seed=seed)
        stores.append(Store(path, **options))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()
