"""support/examples.py: datasets in every form that is read, and one clear line for all others."""

import json

import datasets
import pytest
from conftest import ROOT

from support.examples import load_examples, load_splits, validation_splits

TINY = str(ROOT / "tiny" / "data")
ROW = {"premise": "Anna bought a dog.", "hypothesis": "Anna bought an animal.", "label": 0}
QUOTED = {"premise": 'Anna said "no, thanks".', "hypothesis": "Anna spoke.", "label": 2}


@pytest.fixture
def write(tmp_path):
    """Writes rows by split as JSON lines, and returns their directory."""

    def write_splits(**splits) -> str:
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{split}.jsonl").write_text(text)
        return str(tmp_path)

    return write_splits


# -----------------------------------------------------------------------------
# What is read


def test_parquet_csv_tsv_and_shards_hold_the_same_rows(tmp_path):
    rows = datasets.Dataset.from_list([ROW, QUOTED])
    rows.to_parquet(tmp_path / "train-00000-of-00002.parquet")
    rows.to_parquet(tmp_path / "train-00001-of-00002.parquet")
    rows.to_csv(tmp_path / "validation_matched.csv", index=False)
    rows.to_csv(tmp_path / "validation_mismatched.tsv", index=False, sep="\t")

    directory = str(tmp_path)
    assert list(load_examples(directory, "train")) == [ROW, QUOTED, ROW, QUOTED]
    splits = validation_splits(directory)
    assert splits == ["validation_matched", "validation_mismatched"]
    for split in splits:
        assert list(load_examples(directory, split)) == [ROW, QUOTED]


def test_matched_and_mismatched_stay_apart():
    splits = validation_splits(TINY)
    assert splits == ["validation_matched", "validation_mismatched"]
    assert [len(load_examples(TINY, split)) for split in splits] == [1000, 1000]


def test_labels_may_be_words(write):
    words = ("contradiction", "neutral", "entailment")
    directory = write(train=[ROW | {"label": word} for word in words])
    assert load_examples(directory, "train")["label"][:] == [2, 1, 0]


def test_labels_with_a_point_become_whole_numbers(write):
    """A CSV file with one empty label has such a column, and so have other programs' files."""
    directory = write(train=[ROW | {"label": label} for label in (0.0, 2.0)])
    labels = load_examples(directory, "train")["label"][:]
    assert labels == [0, 2]
    assert all(type(label) is int for label in labels)


def test_rows_with_a_hidden_label_are_dropped_with_a_line_that_says_so(write, capsys):
    directory = write(validation=[ROW | {"label": -1}, ROW, QUOTED, ROW | {"label": -1}])
    assert list(load_examples(directory, "validation")) == [ROW, QUOTED]
    assert capsys.readouterr().err == "validation: 2 rows without a label dropped\n"


def test_a_limit_counts_labelled_rows_from_the_first(write):
    directory = write(train=[ROW | {"label": -1}, ROW, QUOTED, ROW])
    assert list(load_examples(directory, "train", 2)) == [ROW, QUOTED]
    assert list(load_examples(directory, "train", 9)) == [ROW, QUOTED, ROW]


def test_other_columns_are_kept(write):
    directory = write(train=[ROW | {"genre": "fiction"}])
    assert load_examples(directory, "train")[0]["genre"] == "fiction"


def test_files_that_are_no_split_are_left_alone(write, tmp_path):
    directory = write(train=[ROW])
    (tmp_path / "notes.csv").write_text("not,rows\n")
    (tmp_path / "train.txt").write_text("not rows")
    assert list(load_splits(directory)) == ["train"]


# -----------------------------------------------------------------------------
# What is refused, in one line


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"premise": "a", "label": 0}], "no column hypothesis; there are premise, label"),
        ([ROW, ROW | {"label": 3}], "row 1: label 3 is not 0, 1, 2"),
        ([ROW | {"label": "maybe"}], "row 0: label 'maybe' is not 0, 1, 2"),
        ([ROW | {"label": None}], "row 0: label None is not 0, 1, 2"),
        ([ROW | {"label": 0.5}], "row 0: label 0.5 is not 0, 1, 2"),
        ([ROW | {"label": True}], "row 0: label True is not 0, 1, 2"),
        ([ROW | {"label": -1}], "no labelled row"),
        ([ROW | {"premise": 5}], "column premise holds int64, not text"),
        ([ROW | {"hypothesis": {"en": "A."}}], "column hypothesis holds {'en': "),
        ([ROW, ROW | {"premise": None}], "row 1: no premise"),
        ([], "train.jsonl is empty"),
    ],
)
def test_rows_that_do_not_fit_are_named(write, rows, message):
    with pytest.raises(ValueError) as raised:
        load_examples(write(train=rows), "train")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_datasets_and_splits_are_named(write, tmp_path):
    with pytest.raises(ValueError, match="no dataset directory 'no/such/data'"):
        load_examples("no/such/data", "train")
    with pytest.raises(ValueError, match=r"holds no train\.\* or validation\*\.\* file"):
        load_examples(str(tmp_path), "train")
    directory = write(train=[ROW])
    with pytest.raises(ValueError, match="has no split 'test', only train"):
        load_examples(directory, "test")
    with pytest.raises(ValueError, match="has no validation split, only train"):
        validation_splits(directory)


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.parquet", b"PAR1 and then nothing"),
        ("train.jsonl", b'{"premise": '),
        ("train.csv", b'premise,hypothesis,label\n"a,b,0\n'),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read .*{name}: ") as raised:
        load_examples(str(tmp_path), "train")
    assert "\n" not in str(raised.value)
