"""data.py: prompt and answer ids, reading the answer, datasets good and bad, the order of examples; and tiny/data itself."""
import itertools
import json
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, in_process, ours, script
from hypothesis import given, strategies
from tokenizers import Tokenizer

import data
import train

TINY = str(ROOT / "tiny" / "data")


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return data.load_tokenizer(tiny)


def test_the_prompt_is_the_original_projects():
    assert data.PROMPT.format(premise="P.", hypothesis="H.") == (
        "You are given a premise and a hypothesis below. If the premise entails the  hypothesis, return 0. If the premise contradicts the hypothesis, "
        "return 2.  Otherwise, if the premise does neither, return 1.\n\n### Premise: P.\n\n### Hypothesis: H.\n\n### Label:")


@pytest.mark.parametrize("split", ["train", "validation_matched", "validation_mismatched"])
def test_prefix_and_rest_are_the_ids_of_the_whole_prompt(tokenizer, split):
    prefix = tokenizer.encode(data.PREFIX).ids
    for example in data.load_examples(TINY, split):
        prompt, answer = data.encode(example, tokenizer)
        assert prompt == tokenizer.encode(data.PROMPT.format(**example)).ids and prompt[:len(prefix)] == prefix
        assert answer == [tokenizer.encode(f" {example['label']}").ids[0], tokenizer.token_to_id("<|endoftext|>")]


def test_a_long_prompt_loses_the_end_of_its_premise_alone(tokenizer):
    example = {"premise": "Anna bought a dog. " * 30 + "Ben saw a cat.", "hypothesis": "Ben saw a fox.", "label": 2}
    whole, answer = data.encode(example, tokenizer)
    cut, cut_answer = data.encode(example, tokenizer, 100)
    assert len(whole) > 100 and len(cut) + len(answer) == 100 and cut_answer == answer
    tail = tokenizer.encode("\n\n### Hypothesis: Ben saw a fox.\n\n### Label:").ids
    assert cut[-len(tail):] == tail and cut[:100 - len(tail) - 2] == whole[:100 - len(tail) - 2]
    assert data.encode(example, tokenizer, len(whole) + 2)[0] == whole
    with pytest.raises(ValueError, match="alone exceeds --max-length 60"):
        data.encode(example | {"hypothesis": "Ben saw a fox. " * 9}, tokenizer, 60)


@pytest.mark.parametrize("text, label", [(" 0", 0), (" 1<|endoftext|>", 1), ("\n\n### Label: 2\n\n### Label: 1", 2), ("10", 10), ("1.5", 1), ("1,234,5", 1234),
                                         ("maybe 2 or 1", 2), ("yes", -1), ("", -1), ("1234", 123), ("label2", 2)])
def test_the_first_number_is_the_answer(text, label):
    assert data.parse(text) == label


@given(strategies.integers(0, 999), strategies.text("abc .:\n#"), strategies.text())
def test_any_text_before_without_digits_and_any_after_a_space_changes_nothing(number, before, after):
    assert data.parse(f"{before}{number} {after}") == number


@given(strategies.text("012 .,#a\ufffd"), strategies.text("0123456789,. a"))
def test_what_follows_a_settled_completion_cannot_change_the_answer(completion, more):
    if data.settled(completion):
        assert data.parse(completion + more) == data.parse(completion)


@pytest.mark.parametrize("completion, expected", [(" 1", False), (" 1\n", True), (" 12", False), ("123", False), ("1234", True), ("1,", False), ("1,23", False),
                                                  ("1,23 ", True), ("1.", True), ("no", False), ("", False)])
def test_a_completion_is_settled_when_its_first_number_has_ended(completion, expected):
    assert data.settled(completion) == expected


# ---- Batches

def test_each_epoch_takes_every_row_once_and_a_run_can_go_on_at_any_batch():
    import datasets
    rows = datasets.Dataset.from_list([{"premise": "p" * (i % 7), "hypothesis": "h", "idx": i} for i in range(10)])

    def take(number, **options):
        return [[row["idx"] for row in batch] for batch in itertools.islice(data.batches(rows, 4, **options), number)]
    first = take(9, seed=3)
    epochs = [sum(first[i:i + 3], []) for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3 and epochs[0] != epochs[1]
    assert sorted(map(len, first[:3])) == [2, 4, 4], "the last rows of an epoch are not dropped"
    assert take(5, seed=3, start=4) == first[4:]
    assert take(9, seed=4) != first


def test_the_rows_of_a_step_come_shortest_first_so_that_accumulated_batches_need_little_padding():
    examples = data.load_examples(TINY, "train")
    steps = list(itertools.islice(data.batches(examples, 64, seed=0), 20))
    padding = {}
    for name, ordered in (("sorted", steps), ("as drawn", [sorted(step, key=lambda row: row["idx"]) for step in steps])):
        lengths = [[len(row["premise"]) + len(row["hypothesis"]) for row in step[start:start + 16]] for step in ordered for start in (0, 16, 32, 48)]
        padding[name] = sum(max(batch) * len(batch) - sum(batch) for batch in lengths)
    assert padding["sorted"] < 0.5 * padding["as drawn"]


def test_targets_come_from_lengths():
    encoded = [([5, 6, 7, 8], [9, 0]), ([5, 6, 7, 8, 3, 4], [1, 0])]
    ids, columns, targets = data.collate(encoded, skip=2, loss="answer")
    assert ids.tolist() == [[7, 8, 9, 0, 0], [7, 8, 3, 4, 1]]
    assert (columns.tolist(), targets.tolist()) == ([[1, 2], [3, 4]], [9, 0, 1, 0])
    ids, places, targets = data.collate(encoded, skip=2, loss="full")
    assert places.tolist() == [0, 1, 2, 5, 6, 7, 8, 9] and targets.tolist() == [8, 9, 0, 8, 3, 4, 1, 0]
    ids, places, targets = data.collate(encoded[:1], skip=0, loss="full")
    assert (ids.tolist(), places.tolist(), targets.tolist()) == ([[5, 6, 7, 8, 9]], [0, 1, 2, 3, 4], [6, 7, 8, 9, 0])


@pytest.mark.parametrize("loss, skip", [("answer", 0), ("answer", 5), ("full", 0), ("full", 5)])
def test_the_loss_is_the_mean_over_the_targets_however_they_fall_into_batches(tiny, tokenizer, loss, skip):
    model = ours(tiny, torch.float32)
    encoded = [data.encode(example, tokenizer) for example in data.load_examples(TINY, "train", 8)]
    alone = []
    for prompt, answer in encoded:  # each row by itself, by the definition of the loss
        ids = torch.tensor([prompt + answer])
        losses = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        alone += losses[-2:].tolist() if loss == "answer" else losses.tolist()
    for sizes in ([8], [3, 5], [1] * 8):
        parts = [encoded[sum(sizes[:i]):sum(sizes[:i + 1])] for i in range(len(sizes))]
        total = sum(train.batch_loss(model, part, skip, loss)[0].item() for part in parts)
        assert abs(total / len(alone) - sum(alone) / len(alone)) < 1e-5


# ---- Datasets

ROW = {"premise": "Anna bought a dog.", "hypothesis": "Anna bought an animal.", "label": 0}


@pytest.fixture
def directory(tmp_path):
    def write(**splits):
        for split, rows in splits.items():
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)
    return write


def test_words_and_hidden_labels_are_understood(directory, capsys):
    rows = [ROW | {"label": label} for label in ("contradiction", "neutral", "entailment")]
    path = directory(train=rows, validation=[ROW, ROW | {"label": -1}])
    assert data.load_examples(path, "train")["label"][:] == [2, 1, 0]
    assert len(data.load_examples(path, "validation")) == 1
    assert "validation: 1 rows without a label dropped" in capsys.readouterr().err


def test_parquet_csv_and_tsv_with_shards_are_read_too(tmp_path):
    import datasets
    rows = datasets.Dataset.from_list([ROW, ROW | {"label": 2, "premise": 'Anna said "no, thanks".'}])
    rows.to_parquet(tmp_path / "train-00000-of-00002.parquet")
    rows.to_parquet(tmp_path / "train-00001-of-00002.parquet")
    rows.to_csv(tmp_path / "validation_matched.csv", index=False)
    rows.to_csv(tmp_path / "validation_mismatched.tsv", index=False, sep="\t")
    assert len(data.load_examples(str(tmp_path), "train")) == 4
    assert data.validation_splits(str(tmp_path)) == ["validation_matched", "validation_mismatched"]
    for split in data.validation_splits(str(tmp_path)):
        assert data.load_examples(str(tmp_path), split)[1] == rows[1]


def test_matched_and_mismatched_stay_apart():
    assert data.validation_splits(TINY) == ["validation_matched", "validation_mismatched"]
    assert [len(data.load_examples(TINY, split)) for split in data.validation_splits(TINY)] == [1000, 1000]


@pytest.mark.parametrize("rows, message", [
    ([{"premise": "a", "label": 0}], "no column hypothesis; there are premise, label"), ([ROW, ROW | {"label": 3}], "row 1: label 3 is not 0, 1, 2"),
    ([ROW | {"label": "maybe"}], "label 'maybe'"), ([ROW | {"label": -1}], "no labelled row"), ([ROW | {"label": None}], "label None"),
    ([ROW | {"label": 0.5}], "label 0.5"), ([ROW | {"premise": 5}], "column premise holds int64, not text"), ([], "train.jsonl is empty")])
def test_a_dataset_that_does_not_fit_is_one_clear_line(directory, rows, message):
    with pytest.raises(ValueError, match=message) as raised:
        data.load_examples(directory(train=rows), "train")
    assert "\n" not in str(raised.value)


def test_missing_datasets_and_splits_are_named(directory, tmp_path):
    with pytest.raises(ValueError, match="no dataset directory 'no/such/data'"):
        data.load_examples("no/such/data", "train")
    with pytest.raises(ValueError, match=r"holds no train.\* or validation\*.\* file"):
        data.load_examples(str(tmp_path), "train")
    with pytest.raises(ValueError, match="has no split 'test', only train"):
        data.load_examples(directory(train=[ROW]), "test")
    with pytest.raises(ValueError, match="has no validation split, only train"):
        data.validation_splits(str(tmp_path))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="cannot read .*train.parquet"):
        data.load_examples(str(tmp_path), "train")


# ---- tiny/data

@pytest.fixture(scope="session")
def make_data():
    sys.path.insert(0, str(ROOT / "tiny"))
    import make_data
    return make_data


def test_the_generator_makes_the_files_that_lie_there(make_data):
    for split, rows in make_data.make_rows().items():
        assert "".join(json.dumps(row) + "\n" for row in rows) == (ROOT / "tiny" / "data" / f"{split}.jsonl").read_text()


def test_no_pair_is_in_two_places_and_a_hypothesis_alone_says_nothing(make_data):
    splits = make_data.make_rows()
    pairs = [(row["premise"], row["hypothesis"]) for rows in splits.values() for row in rows]
    assert len(pairs) == len(set(pairs)) == 14_000
    for rows in splits.values():
        labels = {}
        for row in rows:
            labels.setdefault(row["hypothesis"], Counter())[row["label"]] += 1
        best = sum(counter.most_common(1)[0][1] for counter in labels.values())
        assert best / len(rows) < 0.35


def test_the_subjects_of_the_mismatched_rows_are_in_no_training_row(make_data):
    splits = make_data.make_rows()
    train_words, mismatched = ({word for row in splits[split] for word in (row["premise"] + " " + row["hypothesis"]).replace(".", "").split()}
                               for split in ("train", "validation_mismatched"))
    lexicon = [make_data.PEOPLE, *make_data.THINGS.values(), make_data.OBJECTS, make_data.COLOURS, *make_data.COUNTRIES.values(), make_data.VERBS]
    new = {word for words in lexicon for word in make_data.part(words, True)}
    assert len(new & mismatched) > 40 and not new & train_words


def test_the_bases_plain_text_holds_no_pair_of_the_data_and_not_the_prompt(make_data):
    known = {(row["premise"], row["hypothesis"].rstrip(".").lower()) for rows in make_data.make_rows().values() for row in rows}
    left_out = {(row["premise"], row["hypothesis"]) for rows in make_data.make_rows().values() for row in rows}
    texts = list(itertools.islice(make_data.documents(1, left_out), 20_000))
    assert not any(piece in text for text in texts for piece in ("Premise:", "Hypothesis:", "Label:", "You are given a premise"))
    forms = [r"(.*\n\n)?(?P<bullet>\W*)\w+: (?P<premise>.+)\n+(?P=bullet)\w+: (?P<claim>.+)[.?]\n+(?P=bullet)\w+: (Yes|Maybe|No)\.",
             r"(?P<premise>.+) (Is it true|Does it follow) that (?P<claim>.+)\? (Yes|Maybe|No)\.", r"(?P<premise>.+\.) (?P<claim>.+)\? (Yes|Maybe|No)\."]
    pairs = [(found["premise"], found["claim"].lower()) for text in texts for form in forms if (found := re.fullmatch(form, text))]
    assert len(pairs) > 10_000 and not known & set(pairs)
    assert len(known & {(row["premise"], row["hypothesis"].rstrip(".").lower()) for row in make_data.make_rows()["train"]}) > 10_000, "the same spelling"
    assert {" 0", " 1", " 2", " 9"} <= {token for text in texts for token in (" " + word.strip(".?") for word in text.split())}


def test_describing_a_dataset(tmp_path):
    done = script("data.py", "--model", "tiny/model", "--dataset", "tiny/data", "--limit", 300, "--plot", tmp_path / "lengths.png")
    assert done.returncode == 0, done.stderr
    assert "validation_mismatched: 300 rows" in done.stdout and "tokens of prompt and label" in done.stdout
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_describing_leaves_out_hidden_labels_and_stops_at_wrong_ones(tmp_path, capsys):
    for split, label in (("train", 0), ("validation", 2), ("test", -1)):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"premise": "A.", "hypothesis": "B.", "label": label}) + "\n")
    in_process(data, "--model", "tiny/model", "--dataset", tmp_path)
    assert "validation: 1 rows" in (printed := capsys.readouterr().out) and "test" not in printed.replace(str(tmp_path), "")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "train.jsonl").write_text('{"premise": "A.", "hypothesis": "B.", "label": 7}\n')
    with pytest.raises(SystemExit, match="error: .*train, row 0: label 7 is not 0, 1, 2"):
        in_process(data, "--model", "tiny/model", "--dataset", tmp_path / "wrong")


def test_a_tokenizer_that_cuts_answers_is_refused(tmp_path):
    from tokenizers import models
    Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, " ": 1, "0": 2}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="cuts the answer ' 0'"):
        data.load_tokenizer(tmp_path)
