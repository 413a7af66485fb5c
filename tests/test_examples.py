"""support/examples.py: datasets in every form that is read, and one clear line for all others."""

import csv
import gzip
import json
import os
import random
import tempfile
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
from conftest import ROOT, SHARED, forget_what_was_read, script
from pyarrow import csv as arrow_csv
from pyarrow import parquet as pyarrow_parquet

from support.examples import (
    Reading,
    count_rows,
    find_splits,
    label_words,
    load_examples,
    validation_splits,
)

TINY = str(ROOT / "tiny" / "data")
ROW = {"premise": "Anna bought a dog.", "hypothesis": "Anna bought an animal.", "label": 0}
DOG = ROW["premise"]
BY_COLUMNS = (
    '{"premise": {"0": "a", "1": "b"}, "hypothesis": {"0": "x", "1": "y"}, '
    '"label": {"1": 1, "0": 0}}'
)
HEADER = "premise\thypothesis\tlabel"
COMMAS = "premise,hypothesis,label\n"
RAN = "Yes, he ran."
LINE = '{"premise": "a", "hypothesis": "x", "label": 0}'
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


def test_rows_without_a_label_are_dropped_and_counted(write, capsys):
    directory = write(validation=[ROW | {"label": -1}, ROW, QUOTED, ROW | {"label": -1}])
    rows = load_examples(directory, "validation")
    assert list(rows) == [ROW, QUOTED]
    line = "validation: 4 rows, 2 without a label dropped; 2 taken, none of neutral\n"
    assert capsys.readouterr().err == line
    counts = count_rows(directory, {"validation": rows}, Reading())
    assert counts == {"validation": {"read": 4, "without_label": 2, "used": 2}}


@pytest.mark.parametrize(
    "labels, numbers", [(["-", "neutral"], [1]), ([0, "-", 2, "neutral"], [0, 2, 1])], ids=str
)
def test_a_dash_is_no_label_and_numbers_may_stand_beside_words(write, labels, numbers):
    directory = write(train=[ROW | {"label": label} for label in labels])
    assert load_examples(directory, "train")["label"] == numbers


def test_a_limit_counts_labelled_rows_from_the_first(write):
    directory = write(train=[ROW | {"label": -1}, ROW, QUOTED, ROW])
    assert list(load_examples(directory, "train", 2)) == [ROW, QUOTED]
    assert list(load_examples(directory, "train", 9)) == [ROW, QUOTED, ROW]


@pytest.mark.parametrize("limit, left_out", [(3, "neutral or contradiction"), (5, "neutral")])
def test_a_limit_says_which_labels_the_rows_that_are_taken_lack(write, capsys, limit, left_out):
    """As where the rows of a file are sorted by their labels."""
    labels = [0] * 4 + [2] * 3 + [1] * 2
    load_examples(write(train=[ROW | {"label": label} for label in labels]), "train", limit)
    line = f"train: 9 rows; {limit} taken, none of {left_out}\n"
    assert capsys.readouterr().err == line


def test_only_the_columns_that_predictions_show_are_kept_besides(write):
    directory = write(train=[ROW | {"genre": "fiction", "idx": 7, "annotator": "x"}])
    assert load_examples(directory, "train")[0] == ROW | {"genre": "fiction", "idx": 7}


def test_files_that_are_no_split_are_left_alone(write, tmp_path):
    directory = write(train=[ROW])
    (tmp_path / "notes.csv").write_text("not,rows\n")
    (tmp_path / "train.txt").write_text("not rows")
    (tmp_path / "state.json").write_text('{"epoch": 3}')  # another program's, not save_to_disk's
    assert list(find_splits(directory)) == ["train"]


# -----------------------------------------------------------------------------
# Names of files


def put(directory, name: str, rows: list[dict] = (ROW, QUOTED)) -> None:
    """Writes rows as JSON lines into a file, with the folders above it."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.mark.parametrize(
    "name, split",
    [
        ("train.jsonl", "train"),
        ("Train.JSONL", "train"),
        ("train.jsonl.gz", "train"),
        ("snli_1.0_train.jsonl", "train"),
        ("dev.jsonl", "validation"),
        ("val.jsonl", "validation"),
        ("valid.jsonl", "validation"),
        ("dev_matched.jsonl", "validation_matched"),
        ("multinli_1.0_dev_mismatched.jsonl", "validation_mismatched"),
        ("validation-matched.jsonl", "validation_matched"),
        ("test_matched.jsonl", "test_matched"),
        ("data/train.jsonl", "train"),
        ("plain/dev.jsonl", "validation"),
        ("data/train-00000-of-00001.jsonl", "train"),
        ("default/train/0000.jsonl", "train"),
        ("data/train-00000-of-00001-a09b74b3ef9c3b56.jsonl", "train"),
    ],
)
def test_names_of_files_and_folders_say_the_split(tmp_path, name, split):
    put(tmp_path, name)
    assert list(find_splits(str(tmp_path))) == [split]
    assert list(load_examples(str(tmp_path), split)) == [ROW, QUOTED]


@pytest.mark.parametrize(
    "name", ["notes.jsonl", "training.jsonl", "validate.jsonl", ".train.jsonl", "train.txt"]
)
def test_other_names_say_nothing(tmp_path, name):
    put(tmp_path, name)
    with pytest.raises(ValueError, match="holds no train"):
        find_splits(str(tmp_path))


def test_files_below_a_dataset_are_not_mixed_with_its_own(tmp_path):
    put(tmp_path, "train.jsonl", [ROW])
    put(tmp_path, "original/train.jsonl", [QUOTED])
    assert list(load_examples(str(tmp_path), "train")) == [ROW]


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    put(tmp_path, "my [v2] {x} *?/train.jsonl", [ROW])
    put(tmp_path, "my v {x} ab/train.jsonl", [QUOTED])
    assert list(load_examples(str(tmp_path / "my [v2] {x} *?"), "train")) == [ROW]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "train.csv"),
        ("train.jsonl", "train.jsonl.gz"),
        ("mnli/train.jsonl", "snli/train.jsonl"),
        ("train.jsonl", "train-00000-of-00001.jsonl"),
        ("train-00000-of-00002.jsonl", "train-00000-of-00003.jsonl"),
        ("train-00000-of-00002.jsonl",),
        ("train-00000-of-00002.jsonl", "train-00000-of-00002-a09b74b3ef9c3b56.jsonl"),
        ("train/0000.jsonl", "train/0002.jsonl"),
        ("train.jsonl", "train_1.jsonl"),
        ("train_20240101.jsonl", "train_20240102.jsonl"),
        ("train_0.csv.gz", "train_1.jsonl.gz"),
        ("snli_train_1.jsonl", "mnli_train_2.jsonl"),
    ],
    ids=lambda names: " and ".join(names),
)
def test_two_files_that_are_not_parts_of_one_are_named(tmp_path, names):
    for name in names:
        put(tmp_path, name)
    with pytest.raises(ValueError, match="for the split train") as raised:
        find_splits(str(tmp_path))
    for name in names:
        assert str(tmp_path / name) in str(raised.value)


def test_parts_with_other_columns_are_named_with_the_column(tmp_path):
    put(tmp_path, "train-00000-of-00002.jsonl", [ROW])
    put(tmp_path, "train-00001-of-00002.jsonl", [ROW | {"source": "b"}])
    message = "train-00001-of-00002.jsonl and .*train-00000-of-.* differ in columns: source"
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path), "train")


def test_parts_may_hold_other_kinds_of_labels(tmp_path):
    put(tmp_path, "train-00000-of-00002.jsonl", [ROW])
    put(tmp_path, "train-00001-of-00002.jsonl", [ROW | {"label": "neutral"}])
    assert load_examples(str(tmp_path), "train")["label"] == [0, 1]


def test_parts_by_number_are_one_split(tmp_path):
    put(tmp_path, "train_1.jsonl", [ROW])
    put(tmp_path, "train_2.jsonl", [QUOTED])
    assert list(load_examples(str(tmp_path), "train")) == [ROW, QUOTED]
    for number in range(3, 12):
        put(tmp_path, f"train_{number}.jsonl", [ROW | {"premise": f"Part {number}."}])
    forget_what_was_read()
    last = load_examples(str(tmp_path), "train")["premise"][-3:]
    assert last == ["Part 9.", "Part 10.", "Part 11."]


def test_numbers_of_versions_are_no_numbers_of_parts(tmp_path):
    put(tmp_path, "train_v1.0.jsonl")
    put(tmp_path, "train_v1.1.jsonl")
    assert list(find_splits(str(tmp_path))) == ["train_v1_0", "train_v1_1"]


def test_a_train_split_of_one_language_is_train(tmp_path):
    put(tmp_path, "train_en.jsonl", [ROW])
    put(tmp_path, "dev_en.jsonl", [QUOTED])
    assert list(find_splits(str(tmp_path))) == ["validation_en", "train"]
    put(tmp_path, "train_de.jsonl", [ROW])
    forget_what_was_read()
    assert list(find_splits(str(tmp_path))) == ["validation_en", "train_de", "train_en"]


def test_a_train_split_alone_gives_a_part_of_it_for_validation(write):
    rows = [ROW | {"premise": f"Row {number}."} for number in range(100)]
    directory = write(train=rows)
    reading = Reading(validation=0.05)
    assert validation_splits(directory, reading) == ["validation"]
    train = load_examples(directory, "train", reading=reading)["premise"][:]
    kept = load_examples(directory, "validation", reading=reading)["premise"][:]
    assert (len(train), len(kept)) == (95, 5)
    assert sorted(train + kept) == sorted(row["premise"] for row in rows)
    forget_what_was_read()
    assert load_examples(directory, "validation", reading=reading)["premise"] == kept


def test_a_train_split_that_cannot_be_cut_is_named(tmp_path):
    reading = Reading(validation=0.05)
    put(tmp_path, "train_en.jsonl", [ROW])
    with pytest.raises(ValueError, match="keeps a premise together, and all rows have the same"):
        load_examples(str(tmp_path), "train", reading=reading)
    put(tmp_path, "train_de.jsonl", [ROW])
    forget_what_was_read()
    with pytest.raises(ValueError, match="has no split 'train', only train_de, train_en"):
        load_examples(str(tmp_path), "validation", reading=reading)


# -----------------------------------------------------------------------------
# What is in them


def test_texts_are_read_as_they_stand(tmp_path):
    """Quotes that a tab-separated file has, words that stand for nothing elsewhere, any letter."""
    texts = [
        '"Oh," she said.', '"Why?"', 'He said "no".', '"', 'a "b', "None", "NA", "N/A", "null",
        "nan", "NaN", "-", "1", "2019-01-01", "\u2028line", " spaces ", "caf\u00e9 \U0001f339", "#",
    ]  # fmt: skip
    rows = [{"premise": text, "hypothesis": text, "label": 1} for text in texts]
    lines = ["premise\thypothesis\tlabel", *(f"{text}\t{text}\t1" for text in texts)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pandas.DataFrame(rows).to_csv(tmp_path / "dev.csv", index=False)
    pandas.DataFrame(rows).to_csv(tmp_path / "test.tsv", index=False, sep="\t")
    for split in ("train", "validation", "test"):
        assert list(load_examples(str(tmp_path), split)) == rows, split


def test_fields_that_a_spreadsheet_left_out_at_the_end_of_a_row_are_missing(tmp_path):
    text = "premise,hypothesis,label,note\nA,B,0\nC,D,1,\nE,F,2,x,,\n\n"
    (tmp_path / "train.csv").write_text(text)
    rows = load_examples(str(tmp_path), "train")
    assert [list(row.values()) for row in rows] == [["A", "B", 0], ["C", "D", 1], ["E", "F", 2]]


@pytest.mark.parametrize(
    "label, number",
    [
        *[(0, 0), (1, 1), (2, 2), (2.0, 2), ("1", 1), ("1.0", 1), ("0.00", 0)],
        *[("entailment", 0), ("Neutral", 1), ("CONTRADICTION", 2), (" neutral ", 1)],
        *[("e", 0), ("N", 1), ("c", 2), ("entails", 0), ("contradicts", 2)],
    ],
)
def test_labels_in_every_spelling(write, label, number):
    """A CSV file with one empty label has a column of floats, and so have other programs' files."""
    labels = load_examples(write(train=[ROW | {"label": label}]), "train")["label"]
    assert labels == [number]
    assert type(labels[0]) is int


@pytest.mark.parametrize(
    "labels, numbers",
    [
        ([-1, 0, 1], None),
        # Of few rows it may be chance.
        ([0, 1] * 15, [0, 1] * 15),
        ([0, 1] * 16, None),
        ([-1, 1], [1]),
        ([-1, 1] * 16, None),
    ],
    ids=["-1, 0, 1", "0, 1 few", "0, 1", "-1, 1 few", "-1, 1"],
)
def test_two_classes_are_no_entailment_and_neutral_in_silence(write, labels, numbers):
    """Nor is -1 no label where it may be one of three."""
    directory = write(train=[ROW | {"label": label} for label in labels])
    if numbers:
        assert load_examples(directory, "train")["label"] == numbers
        return
    listed = ", ".join(map(str, sorted(set(labels))))
    with pytest.raises(ValueError, match=f"labels are {listed}, which may be two classes"):
        load_examples(directory, "train")
    reading = Reading(labels=("entailment", "neutral", "contradiction"))
    said = load_examples(directory, "train", reading=reading)["label"]
    assert said == [label for label in labels if label >= 0]


def test_a_part_may_hold_two_of_the_labels(tmp_path):
    """As where rows were sorted by their labels before they were cut into parts."""
    put(tmp_path, "train_0.jsonl", [ROW | {"label": number % 2} for number in range(40)])
    put(tmp_path, "train_1.jsonl", [QUOTED])
    assert len(load_examples(str(tmp_path), "train")) == 41


@pytest.mark.parametrize(
    "names, numbers, given",
    [
        (["entailment", "neutral", "contradiction"], [0, 1, 2, 0], ()),
        (["contradiction", "entailment", "neutral"], [2, 0, 1, 2], ()),
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0, 2], ()),
        (["NO", "YES", "MAYBE"], [2, 0, 1, 2], ("YES=e", "MAYBE=n", "NO=c")),
    ],
)
def test_labels_with_names_follow_their_names(tmp_path, names, numbers, given):
    save_with_names(tmp_path / "train.parquet", names, [0, 1, 2, 0])
    reading = Reading(labels=given)
    assert load_examples(str(tmp_path), "train", reading=reading)["label"] == numbers


def save_with_names(path, names: list[str], labels: list[int]) -> None:
    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=names),
    )
    rows = [ROW | {"label": label} for label in labels]
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def test_a_struct_with_a_field_called_names_is_no_label(tmp_path):
    rows = datasets.Dataset.from_list([ROW | {"meta": {"names": "a"}}])
    rows.to_parquet(tmp_path / "train.parquet")
    assert list(load_examples(str(tmp_path), "train")) == [ROW]


def test_two_classes_are_refused_by_name(tmp_path):
    save_with_names(tmp_path / "train.parquet", ["entailment", "not_entailment"], [0, 1])
    with pytest.raises(ValueError, match="row 1: label 'not_entailment' is none of"):
        load_examples(str(tmp_path), "train")


@pytest.mark.parametrize(
    "given, labels, numbers",
    [
        (["contradiction", "entailment", "neutral"], [0, 1, 2], [2, 0, 1]),
        (["yes=entailment", "maybe=neutral", "no=contradiction"], ["no", "YES"], [2, 0]),
        (["1=entailment", "2=neutral", "3=contradiction"], [1, 2, 3], [0, 1, 2]),
        (["c", "n", "e"], ["0", "-", "entailment"], [2, 0]),
        (["-1=contradiction", "0=neutral", "1=entailment"], [-1, 0, 1], [2, 1, 0]),
        (["yes=entailment", "=neutral", "no=contradiction"], ["yes", None], [0, 1]),
    ],
)
def test_labels_of_any_other_meaning_can_be_said(write, given, labels, numbers):
    directory = write(train=[ROW | {"label": label} for label in labels])
    reading = Reading(labels=tuple(given))
    assert load_examples(directory, "train", reading=reading)["label"] == numbers


@pytest.mark.parametrize("given", [["e", "n", "n"], ["e", "n", "maybe"], ["e", "n", "x="]])
def test_labels_that_are_not_the_three_are_refused(write, given):
    with pytest.raises(ValueError, match="must mean each of entailment, neutral, contradiction"):
        load_examples(write(train=[ROW]), "train", reading=Reading(labels=tuple(given)))


@pytest.mark.parametrize(
    "columns",
    [
        ("sentence1", "sentence2", "gold_label"),
        ("Premise", "Hypothesis", "Label"),
        ("context", "hypothesis", "label"),
        ("premise", "hypo", "gold"),
    ],
)
def test_columns_under_their_usual_names(write, columns):
    rows = [dict(zip(columns, row.values())) | {"other": 1} for row in (ROW, QUOTED)]
    assert list(load_examples(write(train=rows), "train")) == [ROW, QUOTED]


def test_columns_of_any_other_name_can_be_said(write):
    row = {"a": "A dog.", "b": "An animal.", "c": 0, "premise": "x", "hypothesis": "y", "label": 2}
    rows = load_examples(write(train=[row]), "train", reading=Reading(columns=("a", "b", "c")))
    assert list(rows) == [{"premise": "A dog.", "hypothesis": "An animal.", "label": 0}]
    for columns, message in [
        (("a", "b", "z"), r"no columns are called z; it has \['a', 'b', 'c'"),
        (("a", "A", "c"), "--columns names one column twice: a A c"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_examples(write(train=[row]), "train", reading=Reading(columns=columns))


def test_a_file_that_has_changed_is_read_anew_even_at_the_same_time(tmp_path):
    """Copies keep the time of their original, by which the library's cache would go."""
    for rows in ([ROW, QUOTED], [QUOTED]):
        put(tmp_path, "train.jsonl", rows)
        os.utime(tmp_path / "train.jsonl", (1e9, 1e9))
        forget_what_was_read()
        assert list(load_examples(str(tmp_path), "train")) == rows


def test_a_split_saved_to_disk_is_called_by_its_folder_however_that_is_typed(
    tmp_path, monkeypatch
):
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "test")
    monkeypatch.chdir(tmp_path / "test")
    assert list(find_splits(".")) == ["test"]


def test_texts_of_a_table_stay_texts_however_many_rows_look_like_numbers(tmp_path):
    texts = ["A room."] * 20_000 + ["007", "1.10", "True"] * 5_000
    lines = [f"{text},{text},1" for text in texts]
    (tmp_path / "train.csv").write_text("\n".join(["premise,hypothesis,label", *lines]))
    assert load_examples(str(tmp_path), "train")["hypothesis"][:] == texts
    (tmp_path / "train.csv").write_text("premise,hypothesis,label\n007,1.10,2\n")
    forget_what_was_read()
    assert load_examples(str(tmp_path), "train")[0]["premise"] == "007"


def test_one_split_that_was_saved_to_disk_is_train(tmp_path):
    rows = datasets.Dataset.from_list([ROW, QUOTED])
    rows.save_to_disk(tmp_path / "pairs", num_shards=2)
    assert list(load_examples(str(tmp_path / "pairs"), "train")) == [ROW, QUOTED]
    rows.select([1]).save_to_disk(tmp_path / "pairs")  # leaves the files of before
    forget_what_was_read()
    with pytest.raises(ValueError, match="data-00000-of-00001.arrow and .*not all parts of one"):
        load_examples(str(tmp_path / "pairs"), "train")
    rows.save_to_disk(tmp_path / "test", num_shards=2)
    assert list(load_examples(str(tmp_path / "test"), "test")) == [ROW, QUOTED]


def test_columns_and_kinds_of_values_may_come_late_in_a_json_file(tmp_path):
    """The library reads 10 MB at a time, and takes the columns of the first part for all."""
    long = ROW | {"premise": "A" * 300, "id": 1, "genre": None}
    late = long | {"id": "a1", "genre": "fiction", "note": "new", "label": "-"}
    put(tmp_path, "train.jsonl", [long] * 30_000 + [late, QUOTED])
    rows = load_examples(str(tmp_path), "train")
    assert len(rows) == 30_001
    assert rows[-1] == QUOTED | {"genre": None}


@pytest.mark.parametrize(
    "name, content, message",
    [
        # (mtime=0: the time of day would make another test of it in each process.)
        ("train.csv", b"premise,hypothesis,label\nYes, he ran.,He ran.,0\n", "row 0 has 4 fields"),
        ("train.tsv", b"premise\thypothesis\tlabel\na\tb\te\tn\n", "row 0 has 4 fields"),
        ("train.csv", b"premise,hypothesis,label,label\na,b,0,1\n", "columns of one name: label"),
        ("train.jsonl", '{"premise": "\u00e9"}'.encode("latin-1"), "codec can't decode.*UTF-8$"),
        ("train.tsv", "premise\thypothesis\tlabel\na\tb\t1\n".encode("utf-16"), "as UTF-8$"),
        ("train.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        # A quote that is left open would take the next row into its field.
        ("train.csv", b'premise,hypothesis,label\n"A,b,0\nC,"d",1\n', "',' expected after"),
        ("train.parquet", b"PAR1 and then nothing", "cannot read"),
        ("train.jsonl", b'{"premise": ', "Expecting value: line 1"),
        ("train.json", b"[]", "holds no rows"),
        ("train.jsonl", b"null\n", "holds no JSON object"),
        ("train.csv", b'premise,hypothesis,label\n"A,B,0\n', "line 2: .*end of data"),
        ("train.jsonl", b"\n\n", "holds no rows"),
        ("train.jsonl", "\u00a0".encode(), "holds no rows"),
        ("train.jsonl", b"[" * 100_000, "recursion"),
        ("train.csv", "premise,hypothesis,label\na,b,1\n".encode("utf-16-le"), "p.x00r.x00"),
        ("train.csv", b"premise,hypothesis,label,\nHi, b,c,0\n", "has 4 fields, the header .* 3$"),
        ("train.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("train.tsv.gz", gzip.compress(b"a" * 999, mtime=0)[:-12], "cannot read"),
        ("train.jsonl.gz", b"no gzip", "cannot read"),
        ("train.jsonl", str(ROW).encode(), "in double quotes: line 1 column 2"),
        ("train.jsonl", f"{LINE},\n{LINE},\n".encode(), "Expecting value: line 1 column 48"),
        ("train.csv", f"# mine\n{COMMAS}a,b,0\n".encode(), "row 0 .* header .its first line. 1$"),
        # The line is that in which the wrong row begins, not the last of the file.
        ("train.csv", f'{COMMAS}a,b,0\n"c,d,1\ne,f,2\n'.encode(), "line 3: .*end of data"),
    ],
)
def test_files_that_hold_no_rows_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_examples(str(tmp_path), "train")
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


FLOW = '"dtype": {"class_label": {"names": {"0": "contradiction"}}}'


@pytest.mark.parametrize(
    "card, content",
    [
        ("README.md", "---\ndataset_info:\n  features:\n  - dtype:\n      class_label:\n---\n"),
        ("README.md", f"---\ndataset_info: {{{FLOW}}}\n---\n"),
        ("../README.md", "---\n- dtype:\n    class_label:\n---\n"),
        ("dataset_infos.json", '{"features": {"label": {"names": [], "_type": "ClassLabel"}}}'),
        ("../README.md", "---\r\n- dtype:\r\n    class_label:\r\n---\r\n"),
    ],
)
def test_a_card_that_gives_the_labels_names_is_not_ignored(tmp_path, card, content):
    directory = tmp_path / "data"
    # The first row has no label, so the file is not of words because of it.
    put(tmp_path, "data/train.jsonl", [ROW | {"label": "-"}, ROW])
    (directory / card).write_text(content)
    with pytest.raises(ValueError, match=r"gives the labels names: say with --labels"):
        load_examples(str(directory), "train")
    reading = Reading(labels=("contradiction", "entailment", "neutral"))
    assert load_examples(str(directory), "train", reading=reading)["label"] == [2]
    # Words need no names.
    forget_what_was_read()
    put(tmp_path, "data/train.jsonl", [ROW | {"label": "neutral"}])
    assert load_examples(str(directory), "train")["label"] == [1]


def test_labels_that_are_said_and_nowhere_there_are_refused(write, tmp_path):
    """Here the file has names for its numbers, and they decide."""
    save_with_names(tmp_path / "train.parquet", ["contradiction", "neutral", "entailment"], [0, 1])
    reading = Reading(labels=("0=entailment", "1=neutral", "2=contradiction"))
    message = "its labels are contradiction, neutral, none of which --labels mentions: 0, 1, 2$"
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path), "train", reading=reading)


@pytest.mark.parametrize(
    "given, words",
    [
        ((), ["entailment", "neutral", "contradiction"]),
        (("c", "n", "e"), ["entailment", "neutral", "contradiction"]),
        (("no=c", "Yes=e", "perhaps=n"), ["Yes", "perhaps", "no"]),
        (("-1=c", "0=n", "1=e"), ["entailment", "neutral", "contradiction"]),
        (("1=e", "2=n", "it's=c"), ["entailment", "neutral", "it's"]),
        (("=n", "yes=e", "no=c"), ["yes", "neutral", "no"]),
    ],
    ids=str,
)
def test_labels_are_called_what_labels_calls_them(given, words):
    assert label_words(Reading(labels=given)) == words


# -----------------------------------------------------------------------------
# Corners of files that others have written


@pytest.mark.parametrize(
    "name, content, texts",
    [
        # Other separators, and a space behind each.
        ("train.csv", 'premise, hypothesis, label\n"Yes, a.", "He ran.", 0\n', ["Yes, a."]),
        ("train.csv", 'premise, hypothesis, label\n"A ""b"".", C, 1\n', ['A "b".']),
        ("train.csv", 'premise;hypothesis;label\n"A ""b"".";C;1\nYes, a;C;1', ['A "b".', "Yes, a"]),
        ("train.csv", f'{HEADER}\nYes, he ran.\tHe ran.\t0\n"A ""b""."\tC\t1\n', [RAN, 'A "b".']),
        ("train.csv", 'sep=;\r\npremise;hypothesis;label\r\n"A ""b"".";C;1\r\n', ['A "b".']),
        ("train.csv", f'{COMMAS}"1,000", "x", 0\n"a", "y", 1\n', ["1,000", "a"]),
        # A quote between tabs is a letter unless all are a spreadsheet's: it puts a field in
        # quotes for a reason, and "Why?" alone gives it none.
        ("train.tsv", f'{HEADER}\n"Why?"\tx\t0\n', ['"Why?"']),
        ("train.tsv", f'{HEADER}\n"""Why?"""\tx\t0\n', ['"Why?"']),
        ("train.tsv", f'{HEADER}\n"a\tb"\tx\t0\n', ["a\tb"]),
        ("train.tsv", f'{HEADER}\n"a\nb"\tx\t0\n', ["a\nb"]),
        ("train.tsv", f'{HEADER}\n"a\tx\t0\nb\ty\t1\nc"\tz\t0', ['"a', "b", 'c"']),
        # A carriage return that belongs to a line end, and one that does not.
        ("train.tsv", f"{HEADER}\r\nA\rB\tC\t1\r\n", ["A\rB"]),
        ("train.tsv", 'premise\thypothesis\tlabel\r\n"A ""b""."\tx\t0\r\n', ['A "b".']),
        ("train.tsv", 'premise\thypothesis\tlabel\n"a\rb"\tx\t0\n', ["a\rb"]),
        # A tab in a text, where the row's last field is empty; a row without its last field.
        ("train.tsv", f'{HEADER}\tnote\n"a ""b"""\tx\t0\t\nc\t"d\te"\t1\t\n', ['a "b"', "c"]),
        ("train.tsv", f'{HEADER}\tnote\n"a\tx\t0\tn\nb"\ty\t1\tn\nc\tz\t2', ['"a', 'b"', "c"]),
        # Texts in quotes below a header without them, as of pyarrow and sqlite3.
        ("train.tsv", 'premise\thypothesis\tlabel\n"a"\t"x"\t0\n"b"\t"y"\t1\n', ["a", "b"]),
        # Excel puts fields with a comma in quotes, and no others.
        ("train.tsv", 'premise\thypothesis\tlabel\n"a, b"\tx\t0\nc\ty\t1\n', ["a, b", "c"]),
        ("train.tsv", 'premise\thypothesis\tlabel\n"a, b"\tx, y\t0\n', ['"a, b"']),
        # Quotes of two fields, around the end of a line that has all its fields.
        ("train.tsv", 'premise\thypothesis\tlabel\n"a\tx\t0\nb"\ty\t1\t\n', ['"a', 'b"']),
        ("train.tsv", 'premise\thypothesis\tlabel\n"a\tx\t0\n""\tz\t1\n"\ty\t1', ['"a', '""', '"']),
        ("train.csv", "premise,hypothesis,label\ra;b;c;d;e,x,0\r", ["a;b;c;d;e"]),
        ("train.csv", 'premise\thypothesis\tlabel\n"a.\tx\t0\nb."\ty\t1\n', ['"a.', 'b."']),
        ("train.csv", "\n\npremise;hypothesis;label\na;x;0\n", ["a"]),
        ("train.csv", '"premise, in English",premise,hypothesis,label\nq, a,x,0\n', [" a"]),
        ("train.csv", "premise,hypothesis,label,,\na,x,0,,\n", ["a"]),
        ("train.csv", ",premise,hypothesis,label\n0,a,x,0\n", ["a"]),  # pandas' index
        ("train.csv", 'premise,hypothesis,label\n"a, b", "x, y", 0\n', ["a, b"]),
        ("train.csv", 'label,premise,hypothesis\n0, "a, b", "x, y"\n', ["a, b"]),
        # pandas' to_json without orient="records"
        ("train.json", json.dumps({name: {"0": text} for name, text in ROW.items()}), [DOG]),
        ("train.json", BY_COLUMNS, ["a", "b"]),
        ("train.json", '[{"premise": "a", "hypothesis": "x", "label": 0}]\n' * 2, ["a", "a"]),
        ("train.json", '{\n"premise": "a",\n"hypothesis": "x", "label": 0\n}\n' * 2, ["a", "a"]),
        ("train.ndjson", '{"premise": "a", "hypothesis": "x", "label": 0}', ["a"]),
        # Lines that end as on an old Mac; pipes.
        ("train.tsv", 'premise\thypothesis\tlabel\ra\tx\t0\r"b"\ty\t1\r', ["a", '"b"']),
        ("train.tsv", 'premise\thypothesis\tlabel\r"a ""b"""\tx\t0\r', ['a "b"']),
        ("train.csv", 'premise|hypothesis|label\n"a|b"|x|0\nc, d|y, z|1\n', ["a|b", "c, d"]),
        # A quote behind a backslash, as MySQL and Spark write it, and backslashes before others.
        ("train.csv", f'{COMMAS}"a \\"b\\" c",x,0\n', ['a "b" c']),
        ("train.csv", f'{COMMAS}"\\"a\\"",x,0\n"\\"b\\"",x,0\n', ['"a"', '"b"']),
        ("train.csv", f'{COMMAS}"\\"a\\", C:\\new",x,0\n"b\\\\",y,1\n', ['"a", C:\\new', "b\\"]),
        ("train.csv", f'{COMMAS}"C:\\",x,0\n"a ""b""",y,1\n', ["C:\\", 'a "b"']),
        ("train.tsv", f'{HEADER}\n"a \\"b\\""\tx\t0\nc\ty\t1\n', ['a "b"', "c"]),
        ("train.tsv", f'{HEADER}\n"a" \\"b\\"\tx\t0\n', ['"a" \\"b\\"']),
        ("train.tsv", f'{HEADER}\r\na\rb\t\\"\t0\r\n', ["a\rb"]),
        ("train.csv", f'{COMMAS}"a,\\"b\\"","x \\\\",0\n', ['a,"b"']),
        # Files that were put one behind another; zeros that a crash has left at the end.
        ("train.jsonl", f"{LINE}\n\ufeff{LINE}\n", ["a", "a"]),
        ("train.csv", f"{COMMAS}a,x,0\n\ufeff{COMMAS}b,y,1\n", ["a", "b"]),
        ("train.jsonl", f"{LINE}\n" + "\0" * 99, ["a"]),
        ("train.tsv", f"{HEADER}\na\tx\t0\n" + "\0" * 99 + "\n", ["a"]),
        # Letters of no width in a name or in a label.
        ("train.csv", "premise\u200b,\u200ehypothesis,label\na,x,\u200bneutral\ufeff\n", ["a"]),
    ],
)
def test_tables_and_objects_as_they_are_meant(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content.encode())
    assert load_examples(str(tmp_path), "train")["premise"] == texts


LONG = "word " * 50_000


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.csv", f"{COMMAS}{LONG},x,0\n"),
        ("train.csv", f'premise;hypothesis;label\n"{LONG}";x;0\n'),
        ("train.tsv", f'{HEADER}\n"{LONG}""a"""\tx\t0\n'),
    ],
)
def test_a_field_may_be_of_any_length(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert len(load_examples(str(tmp_path), "train")[0]["premise"]) >= len(LONG)


ROWS = [ROW, QUOTED, ROW | {"label": 1}]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROW}
FORMS = {
    "a list for each column": COLUMNS,
    "rows in a field": {"version": "1.0", "tags": ["nli"], "data": ROWS},
    "a split in a field": {"train": ROWS},
    "rows by their id": {f"id{number}": row for number, row in enumerate(ROWS)},
}


@pytest.mark.parametrize("form", FORMS)
def test_json_that_people_write(tmp_path, form):
    (tmp_path / "train.json").write_text(json.dumps(FORMS[form]))
    assert list(load_examples(str(tmp_path), "train")) == ROWS


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
@pytest.mark.parametrize("names", [tuple(ROW), ("text", "claim", "verdict")], ids="-".join)
def test_json_of_pandas(tmp_path, orient, names):
    frame = pandas.DataFrame([list(row.values()) for row in ROWS * 2], columns=names)
    frame.to_json(tmp_path / "train.json", orient=orient)
    rows = load_examples(str(tmp_path), "train", reading=Reading(columns=names))
    assert list(rows) == ROWS * 2


@pytest.mark.parametrize(
    "value, message",
    [
        ([["a", "x", 0]], 'row 0 is \\["a", "x", 0\\]; pandas\' to_json.path, orient="records"'),
        (json.dumps(ROW), "holds no JSON object for each row: row 0 is"),
        ({"train": ROWS, "dev": ROWS}, "rows in train and in dev: write each into a file of its"),
        (COLUMNS | {"label": [0]}, "its columns differ in length"),
        ({"columns": list(ROW), "data": [["a", "x", 0, 1]]}, "row 0 has 4 fields, the header"),
    ],
    ids=str,
)
def test_json_that_could_be_read_in_several_ways_is_one_line(tmp_path, value, message):
    (tmp_path / "train.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"cannot read .*train.json: .*{message}") as raised:
        load_examples(str(tmp_path), "train")
    assert "\n" not in str(raised.value)


def test_a_row_with_lists_and_objects_is_a_row(write):
    row = ROW | {"annotator_labels": ["e", "n"], "workers": [{"id": 1}], "meta": {"a": {"b": 1}}}
    assert list(load_examples(write(train=[row]), "train")) == [ROW]


def test_a_file_is_unpacked_by_its_content(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert list(load_examples(str(tmp_path), "train")) == [ROW]


# A category that no row has, as pandas keeps it when rows are left out.
UNUSED = pyarrow.array(["not_entailment", "entailment", "entailment"]).dictionary_encode()[1:]


def arrow_columns(**columns) -> pyarrow.Table:
    rows = {name: [value, value] for name, value in ROW.items()}
    return pyarrow.table(rows | columns)


@pytest.mark.parametrize(
    "columns",
    [
        {"other": pyarrow.array([[("a", 1)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.int64()))},
        {"label": pyarrow.array(["entailment"] * 2).dictionary_encode()},
        {"premise": pyarrow.array([ROW["premise"]] * 2, pyarrow.large_string())},
        {"label": pyarrow.array([0.0, 0.0])},
        {"label": UNUSED.cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.string()))},
        {"premise": pyarrow.array([ROW["premise"]] * 2, pyarrow.string_view())},
        {"premise": pyarrow.array([ROW["premise"]] * 2, pyarrow.binary())},
    ],
    ids=lambda columns: str(next(iter(columns.values())).type),
)
def test_columns_of_any_type_of_arrow(tmp_path, columns):
    rows = arrow_columns(**columns)
    try:
        pyarrow_parquet.write_table(rows, tmp_path / "train.parquet")
    except pyarrow.ArrowNotImplementedError:
        pytest.skip("this version of pyarrow cannot write the type into a parquet file")
    assert list(load_examples(str(tmp_path), "train")) == [ROW, ROW]


def test_a_missing_label_is_named_where_arrow_has_its_column_in_several_chunks(tmp_path):
    rows = arrow_columns(label=pyarrow.array([0, None]))
    with pyarrow.ipc.new_stream(tmp_path / "train.arrow", rows.schema) as file:
        file.write_table(rows)
        file.write_table(rows)
    with pytest.raises(ValueError, match="train.arrow, row 1: label None is none of"):
        load_examples(str(tmp_path), "train")


@pytest.mark.parametrize("kind", ["int32", "float64"])
def test_names_of_labels_are_kept_where_their_numbers_are_of_another_type(tmp_path, kind):
    path = tmp_path / "train.parquet"
    save_with_names(path, ["contradiction", "entailment", "neutral"], [0, 1])
    table = pyarrow_parquet.read_table(path)
    place = table.column_names.index("label")
    table = table.set_column(place, "label", table["label"].cast(kind))
    pyarrow_parquet.write_table(table, path)
    assert load_examples(str(tmp_path), "train")["label"] == [2, 0]


@pytest.mark.parametrize(
    "values",
    [
        *[[0.5, None], [None, None], [[1], [2]], [{"a": 1}, None], ["a", 1], [True, False]],
        *[[2**70, 1], ["a", "Hi \ud83d"]],
    ],
    ids=ascii,
)
def test_an_idx_that_is_no_number_and_no_text_is_left_out(write, values):
    """predictions_SPLIT.jsonl has the number of a row instead."""
    rows = [ROW | {"idx": value, "genre": "fiction"} for value in values]
    assert list(load_examples(write(train=rows), "train")) == [ROW | {"genre": "fiction"}] * 2


def test_dates_and_bytes_are_no_idx_and_no_genre(tmp_path):
    damaged = pyarrow.array([b"a", b"\xe9"]).view(pyarrow.string())
    for genre in ([b"a", b"b"], damaged):
        table = arrow_columns(idx=pyarrow.array([date(2020, 1, 1)] * 2), genre=genre)
        pyarrow_parquet.write_table(table, tmp_path / "train.parquet")
        forget_what_was_read()
        assert list(load_examples(str(tmp_path), "train")) == [ROW, ROW]


@pytest.mark.parametrize(
    "metadata", ["null", '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}']
)
def test_metadata_that_do_not_give_the_names_of_labels_are_one_line(tmp_path, metadata):
    table = arrow_columns().replace_schema_metadata({"huggingface": metadata})
    pyarrow_parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet: its huggingface metadata is not as"):
        load_examples(str(tmp_path), "train")


def test_two_columns_of_one_name_in_a_parquet_file_are_named(tmp_path):
    table = arrow_columns().append_column("label", [[2, 2]])
    pyarrow_parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet: it has two columns of one name: label$"):
        load_examples(str(tmp_path), "train")


def test_a_part_without_rows_is_no_error_where_others_have_some(tmp_path):
    pyarrow_parquet.write_table(arrow_columns()[:0], tmp_path / "train-00000-of-00003.parquet")
    pyarrow_parquet.write_table(arrow_columns(), tmp_path / "train-00001-of-00003.parquet")
    pyarrow_parquet.write_table(arrow_columns()[:0], tmp_path / "train-00002-of-00003.parquet")
    assert list(load_examples(str(tmp_path), "train")) == [ROW, ROW]
    # A file that has not even columns was not written to its end.
    put(tmp_path, "validation-00000-of-00002.jsonl", [ROW])
    put(tmp_path, "validation-00001-of-00002.jsonl", [])
    forget_what_was_read()
    with pytest.raises(ValueError, match="validation-00001-of-00002.jsonl: it holds no rows"):
        load_examples(str(tmp_path), "validation")


def test_parts_may_hold_texts_of_two_types_of_arrow(tmp_path):
    """Polars writes large strings, pandas strings."""
    for number, kind in enumerate((pyarrow.string(), pyarrow.large_string())):
        table = arrow_columns(premise=pyarrow.array([DOG] * 2, kind), idx=[7, 8])
        pyarrow_parquet.write_table(table, tmp_path / f"train_{number}.parquet")
    rows = load_examples(str(tmp_path), "train")
    assert list(rows) == [ROW | {"idx": idx} for idx in (7, 8)] * 2


def test_an_arrow_file_that_was_not_written_to_its_end_is_refused(tmp_path):
    rows = datasets.Dataset.from_list([ROW, QUOTED])
    rows.save_to_disk(tmp_path / "saved")
    content = (tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()
    (tmp_path / "train.arrow").write_bytes(content[:-8])
    with pytest.raises(ValueError, match="train.arrow: .* its end is missing"):
        load_examples(str(tmp_path), "train")


def test_a_part_that_is_a_broken_link_is_named(tmp_path):
    put(tmp_path, "train_0.jsonl")
    (tmp_path / "train_1.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot read .*train_1.jsonl: .*No such file"):
        load_examples(str(tmp_path), "train")


@pytest.mark.parametrize("column", ["premise", "hypothesis", "label"])
def test_half_a_surrogate_pair_is_named_with_its_row(write, column):
    rows = [ROW, ROW | {column: "Hi \ud83d"}]
    with pytest.raises(ValueError, match=r"train.jsonl, row 1: .*\\ud83d") as raised:
        load_examples(write(train=rows), "train")
    str(raised.value).encode()  # the line itself can be printed


def test_half_a_surrogate_pair_in_a_column_that_nobody_reads_does_no_harm(write):
    directory = write(train=[ROW | {"note": "\ud83d", "\ud83d": 1}])
    assert list(load_examples(directory, "train")) == [ROW]


@pytest.mark.parametrize(
    "column, message",
    [
        ("premise", "train.parquet, row 1: the premise is not UTF-8: .*can't decode byte 0xe9"),
        ("label", "train.parquet: the label: .*Invalid UTF8 sequence at string index 1"),
    ],
)
def test_bytes_that_are_not_utf_8_are_named(tmp_path, column, message):
    damaged = pyarrow.array([b"neutral", b"\xe9"]).view(pyarrow.string())
    pyarrow_parquet.write_table(arrow_columns(**{column: damaged}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path), "train")


# -----------------------------------------------------------------------------
# Files that other tools have written


def tab_joined(frame: pandas.DataFrame, path) -> None:
    """As GLUE's files are: no quoting at all."""
    lines = ["\t".join(map(str, row)) for row in [list(frame), *frame.values.tolist()]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def csv_module(frame: pandas.DataFrame, path) -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # with a mark, as Excel's
        csv.writer(file, delimiter="\t").writerows([list(frame), *frame.values.tolist()])


def pyarrow_file(frame: pandas.DataFrame, path) -> None:
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)


def pyarrow_tsv(frame: pandas.DataFrame, path) -> None:
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    arrow_csv.write_csv(table, path, arrow_csv.WriteOptions(delimiter="\t"))


def to_disk(frame: pandas.DataFrame, path) -> None:
    rows = datasets.Dataset.from_pandas(frame, preserve_index=False)
    datasets.DatasetDict(train=rows).save_to_disk(path)


WRITERS = {
    "train.csv": lambda frame, path: frame.to_csv(path, index=False),
    "train.csv.gz": lambda frame, path: frame.to_csv(path, index=False),
    "train.tsv": tab_joined,
    "Train.tsv": csv_module,
    "dev/train.tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "quoted/train.tsv": pyarrow_tsv,
    "train.tsv.gz": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "train.json": lambda frame, path: frame.to_json(path, orient="records"),
    "train.jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "train.jsonl.gz": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "train.parquet": lambda frame, path: frame.to_parquet(path),
    "train.arrow": pyarrow_file,
    "disk": to_disk,
}


def check_writer(name: str, frame: pandas.DataFrame, directory) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    WRITERS[name](frame, path)
    rows = load_examples(str(path if name == "disk" else path.parent), "train")
    for column in ("premise", "hypothesis", "label"):
        assert rows[column][:] == frame[column].tolist(), column
    # A table of texts has no numbers.
    assert [int(number) for number in rows["idx"][:]] == frame["idx"].tolist()


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_other_tools_hold_the_same_rows(tmp_path, name):
    draw = random.Random(0)
    words = ['"', '"Oh,"', "she said", '"no".', "N/A", "None", "a,b", ";", "'", "caf\u00e9", "\\"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(400)]
    frame = pandas.DataFrame(
        {
            "premise": texts[:200],
            "hypothesis": texts[200:],
            "label": [draw.randrange(3) for _ in range(200)],
            "idx": range(200),
        }
    )
    check_writer(name, frame, tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/mnli, which is not there")
@pytest.mark.parametrize("name", WRITERS)
def test_shared_mnli_in_files_of_other_tools_holds_the_same_rows(tmp_path, name):
    frame = pandas.read_parquet(SHARED / "mnli" / "validation_matched.parquet")
    assert len(frame) == 9815
    check_writer(name, frame, tmp_path)


# -----------------------------------------------------------------------------
# What is refused, in one line


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"premise": "a", "label": 0}], "no columns are called hypothesis or sentence2 or hypo;"),
        ([ROW, ROW | {"label": 3}], "row 1: label 3 is none of 0, ent"),
        ([ROW | {"label": "maybe"}], "row 0: label 'maybe' is none of 0, ent"),
        ([ROW | {"label": None}], "label None is none of 0, ent"),
        ([ROW | {"label": None}], "and - stands for no label"),
        ([ROW | {"label": 0.5}], "row 0: label 0.5 is none of 0, ent"),
        ([ROW | {"label": True}], "row 0: label True is none of 0, ent"),
        ([ROW | {"label": -1}], "no labelled row"),
        ([ROW | {"premise": 5}], "row 0: the premise is 5, not text"),
        ([ROW | {"hypothesis": {"en": "A."}}], "row 0: the hypothesis is {'en': 'A.'}, not text"),
        ([ROW, ROW | {"premise": None}], "row 1: the premise is missing"),
        ([], "train.jsonl: it holds no rows"),
        ([ROW | {"Label": 2}], "2 columns are called label or gold_label"),
        ([ROW, ROW | {"label": ""}], "row 1: label '' is none of 0, ent"),
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
    with pytest.raises(ValueError, match="train.jsonl is a file: call it train.jsonl, pass"):
        find_splits(f"{directory}/train.jsonl")
    with pytest.raises(ValueError, match="no dataset directory ''"):
        find_splits("")
    with pytest.raises(ValueError, match="has no split 'test', only train"):
        load_examples(directory, "test")
    with pytest.raises(ValueError, match="has no validation split, only train"):
        validation_splits(directory)


def test_where_no_file_says_its_split_those_that_are_there_are_named(tmp_path):
    put(tmp_path, "train/a.jsonl")
    put(tmp_path, "train/b.txt")
    with pytest.raises(ValueError, match="only train/a.jsonl, train/b.txt$"):
        load_examples(str(tmp_path), "train")


@contextmanager
def another_user():
    """Who may read what all may: the tests may run as root, who may read everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("closed", ["data", "data/train", "data/train/0000.jsonl"])
def test_what_may_not_be_read_is_named(closed):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        put(Path(folder), "data/train/0000.jsonl")
        os.chmod(folder, 0o755)
        os.chmod(Path(folder) / closed, 0)
        try:
            with another_user(), pytest.raises((OSError, ValueError)) as raised:
                load_examples(f"{folder}/data", "train")
        finally:
            os.chmod(Path(folder) / closed, 0o755)
    assert f"{folder}/{closed}" in str(raised.value)
    assert "Permission denied" in str(raised.value)


def test_files_of_a_directory_need_no_cache(tmp_path):
    put(tmp_path, "train.jsonl")
    (tmp_path / "file").write_text("no folder")
    home = {"HF_HOME": str(tmp_path / "file" / "cache")}
    describe = ("-m", "scripts.describe", "--model", "tiny/model", "--dataset")
    done = script(*describe, tmp_path, env=home, fresh=True)
    assert done.returncode == 0, done.stderr
