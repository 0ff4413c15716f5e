import csv
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from rlhf_recipes.data import load_rows, loading
from rlhf_recipes.data.loading import load_records, local_splits

ROWS = [
    {"prompt": "The film was", "score": 1.5, "ids": [1, 2]},
    {"prompt": 'naïve, "quoted"\nand\u2028cut', "score": -2.0, "ids": []},
]


def write_lines(path, rows=ROWS):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write_list(path, rows=ROWS):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)
    return path


@pytest.fixture(autouse=True)
def _caches_stay_empty(tmp_path, monkeypatch):
    """Whatever a test reads, nothing may be written beside it or into the library's cache."""
    cache = tmp_path / "hf_cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    yield
    assert not cache.exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
@pytest.mark.parametrize("write", [write_lines, write_list])
def test_json_files_come_back_as_they_were_written(tmp_path, name, write):
    assert load_rows(str(write(tmp_path / name))).to_list() == ROWS


def test_parquet_and_csv_files_come_back_as_they_were_written(tmp_path):
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert load_rows(str(tmp_path / "a.parquet")).to_list() == ROWS

    long = "many\nlines\n" * 40_000  # four of these are more than pyarrow reads at once
    rows = [
        *({"text": long, "label": label} for label in range(4)),
        {"text": "one\ntwo, three", "label": 1},
        {"text": "", "label": 0},
        {"text": "NA", "label": 1},
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_rows(str(tmp_path / "a.csv")).to_list() == rows  # no text turns into a missing value


def test_columns_are_those_of_all_rows_and_not_only_of_the_first(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b", "tie": True}])
    assert load_rows(str(path)).to_list() == [{"prompt": "a", "tie": None}, {"prompt": "b", "tie": True}]


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b"}\r\n\n')
    assert load_rows(str(tmp_path / "a.jsonl"))["prompt"][:] == ["a", "b"]


def test_changed_files_are_read_anew(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "old"}])
    load_rows(str(path))
    write_lines(path, [{"prompt": "new"}])
    assert load_rows(str(path))["prompt"][:] == ["new"]


def test_files_of_a_folder_are_splits(tmp_path):
    write_lines(tmp_path / "train.jsonl", ROWS[:1])
    write_lines(tmp_path / "test.jsonl.gz", ROWS[1:])
    (tmp_path / "README.md").write_text("about")
    assert load_rows(str(tmp_path)).to_list() == ROWS[:1]
    assert load_rows(str(tmp_path), split="test").to_list() == ROWS[1:]
    with pytest.raises(ValueError, match=r"has no split 'validation'\. Its splits: 'test', 'train'\."):
        load_rows(str(tmp_path), split="validation")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "a.jsonl")
    assert len(load_rows("~/a.jsonl")) == 2


def test_parquet_shards_are_one_split(tmp_path):
    for part, row in enumerate(ROWS):
        Dataset.from_list([row]).to_parquet(str(tmp_path / f"train-0000{part}-of-00002.parquet"))
    assert load_rows(str(tmp_path))["prompt"][:] == [row["prompt"] for row in ROWS]


def test_one_split_in_two_formats_is_refused(tmp_path):
    write_lines(tmp_path / "train.jsonl")
    write_list(tmp_path / "train.json")
    with pytest.raises(ValueError, match=r"holds split 'train' more than once: train\.json, train\.jsonl"):
        load_rows(str(tmp_path))


def test_saved_datasets_are_read_and_left_alone(tmp_path):
    one, two = Dataset.from_list(ROWS[:1]), Dataset.from_list(ROWS[1:])
    one.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=one, test=two).save_to_disk(str(tmp_path / "both"))
    before = sorted(tmp_path.rglob("*"))
    assert load_rows(str(tmp_path / "one")).map(lambda row: {"more": 1})["more"][:] == [1]
    assert load_rows(str(tmp_path / "both"), split="test").to_list() == ROWS[1:]
    assert sorted(tmp_path.rglob("*")) == before, "a later map wrote into the user's folder"
    with pytest.raises(ValueError, match="no split 'test'"):
        load_rows(str(tmp_path / "one"), split="test")
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_rows(str(tmp_path / "both"), split="dev")


@pytest.mark.parametrize(
    "name", ["none.jsonl", "./none", "/none/x", "../none", "a/b/c", "~/none", "data/none.parquet"]
)
def test_a_missing_path_is_an_error(name):
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load_rows(name)


@pytest.mark.parametrize("name", ["imdb", "Anthropic/hh-rlhf", "org/data.v2"])
def test_other_names_go_to_the_hub_without_remote_code(monkeypatch, name):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    assert len(load_rows(name, config="plain", split="train[:2]")) == 2
    assert calls == [((name, "plain"), {"split": "train[:2]"})]


def test_a_dataset_that_the_hub_does_not_give_is_an_error():
    with pytest.raises(
        FileNotFoundError, match=r"'nobody/nothing' is no local file or folder, and could not be loaded"
    ):
        load_rows("nobody/nothing")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"\n', r"a\.jsonl, line 3: not valid JSON"),
        ('[{"prompt": "a"},\n {"prompt" "b"}]', r"a\.jsonl, line 2: not valid JSON"),
        ('{"prompt": "a"}\n"b"\n', r"a\.jsonl, line 2: expected a JSON object per row"),
        ('{"prompt": "a"}\n[{"prompt": "b"}]\n', r"a\.jsonl, line 2: expected a JSON object per row"),
        ('["a"]', r"a\.jsonl, line 1: expected a JSON object per row"),
        ('{"n": 1}\n{"n": "x"}\n', r"a\.jsonl: `n` has values of different types: a number in row 0, text in row 1"),
        ('{"n": null}\n{"n": "x"}\n{"n": 1}\n', r"`n` has values of .*: text in row 1, a number in row 2\. Give all"),
        ('{"n": {"a": 1}}\n{"n": "x"}\n', r"`n` has values of different types: an object in row 0, text in row 1"),
        ('{"n": [{}]}\n{"n": {}}\n', r"`n` has values of different types: a list in row 0, an object in row 1"),
        ('{"n": 1.5}\n{"n": true}\n', r"`n` has values of .*: a number in row 0, true or false in row 1"),
        ('{"m": 1, "n": [1]}\n{"m": 1, "n": ["x"]}\n', r"a\.jsonl: `n` has values of different types: Could not"),
        ("", "Split 'train' of .* has no rows"),
        ("[]", "has no rows"),
    ],
)
def test_broken_and_empty_json_is_an_error(tmp_path, content, expected):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=expected):
        load_rows(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "\xff"}'),
        ("a.jsonl.gz", b'{"prompt": "a"}'),
        ("a.json.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9]),
        ("a.parquet", b"PAR1"),
        ("a.csv", b""),
        ("a.csv", b"a,b\n1,2,3\n"),
    ],
)
def test_broken_files_are_errors_that_name_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        load_rows(str(tmp_path / name))


def test_unknown_types_and_settings_are_errors(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a\.txt is of an unknown type\. Files that can be read: \.jsonl\.gz"):
        load_rows(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="holds none of the files that can be read"):
        load_rows(str(tmp_path))
    path = str(write_lines(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"has no split 'test'\. Its splits: 'train'"):
        load_rows(path, split="test")
    with pytest.raises(ValueError, match=r"`dataset_config` \('plain'\) is for datasets on the hub"):
        load_rows(path, config="plain")
    with pytest.raises(ValueError, match="Set `dataset_name`"):
        load_rows("")


@pytest.mark.parametrize(
    ("file", "rows", "columns"),
    [
        ("hh_harmless/pairs.jsonl.gz", 1812, ["chosen", "rejected"]),
        ("movie_reviews/reviews.jsonl.gz", 1600, ["text", "label"]),
        ("sentence_polarity/snippets.jsonl.gz", 8662, ["text", "label"]),
    ],
)
def test_real_files(shared_data, file, rows, columns):
    loaded = load_rows(str(shared_data / file))
    assert (len(loaded), loaded.column_names) == (rows, columns)
    with gzip.open(shared_data / file, "rb") as lines:
        assert loaded.to_list() == [json.loads(line) for line in lines]


def test_records_say_where_they_come_from(tmp_path):
    path, rows = tmp_path / "train.jsonl", [{"label": 0.5}, {"label": "tie", "row": 9}]
    path.write_text("\n" + "\n\n".join(map(json.dumps, rows)))
    source = str(path)
    assert load_records(source) == [
        {"label": 0.5, "source": source, "row": 0, "line": 2},
        {"label": "tie", "source": source, "row": 9, "line": 4},
    ]
    whole = str(write_list(tmp_path / "test.json", rows))
    assert [row["line"] for row in load_records(whole)] == [None, None]
    assert [row["label"] for row in load_records(str(tmp_path))] == [0.5, "tie"]


def test_records_of_other_files_and_of_shards(tmp_path):
    for shard in range(2):
        Dataset.from_list(ROWS).to_parquet(str(tmp_path / f"train-0000{shard}-of-00002.parquet"))
    records = load_records(str(tmp_path))
    assert [(row["row"], row["line"], row["source"][-23:-8]) for row in records] == [
        (number, None, f"-0000{shard}-of-00002") for shard in range(2) for number in range(2)
    ]
    assert records[0]["ids"] == [1, 2]
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert {row["source"] for row in load_records(str(tmp_path / "saved"))} == {str(tmp_path / "saved")}


def test_records_of_broken_and_empty_files_are_errors(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read"):
        load_records(str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"Split 'train' of .*b.jsonl has no rows"):
        load_records(str(tmp_path / "b.jsonl"))


def test_splits_are_listed_as_they_would_be_loaded(tmp_path):
    rows = Dataset.from_list([{"prompt": "a"}])
    DatasetDict({"train": rows, "valid": rows}).save_to_disk(tmp_path / "saved")
    rows.save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet"):
        rows.to_parquet(tmp_path / "files" / name)
    expected = {
        "saved": {"train", "valid"},
        "one": {"train"},
        "files": {"train", "test"},
        "files/test.parquet": {"train"},
    }
    for name, splits in expected.items():
        assert set(local_splits(str(tmp_path / name))) == splits
        for split in splits:
            assert load_rows(str(tmp_path / name), split=split)["prompt"][0] == "a"
    assert local_splits("someone/rows") is None, "on the hub"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "none of the files that can be read"),
        ("notes.txt", "unknown type"),
        ("nothing.csv", "no file or folder"),
    ],
)
def test_splits_of_nothing_are_errors(tmp_path, name, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises((FileNotFoundError, ValueError), match=expected):
        local_splits(str(tmp_path / name))
