"""data.py: prompt and answer ids, reading the answer, the order of rows, and batches."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, ours
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

import data
import train
from support.examples import load_examples
from support.rows import Rows

TINY = str(ROOT / "tiny" / "data")


@pytest.fixture(scope="session")
def tokenizer(tiny) -> Tokenizer:
    return data.load_tokenizer(tiny)


# -----------------------------------------------------------------------------
# Prompt and answer


def test_the_prompt_is_the_original_projects():
    """With its double spaces: a published result depends on every character."""
    assert data.PROMPT.format(premise="P.", hypothesis="H.") == (
        "You are given a premise and a hypothesis below. If the premise entails the  hypothesis, "
        "return 0. If the premise contradicts the hypothesis, return 2.  Otherwise, if the premise "
        "does neither, return 1.\n\n### Premise: P.\n\n### Hypothesis: H.\n\n### Label:"
    )


@pytest.mark.parametrize("split", ["train", "validation_matched", "validation_mismatched"])
def test_prefix_and_rest_are_the_ids_of_the_whole_prompt(tokenizer, split):
    prefix = tokenizer.encode(data.PREFIX).ids
    eos = tokenizer.token_to_id("<|endoftext|>")
    for example in load_examples(TINY, split):
        prompt, answer = data.encode(example, tokenizer)
        assert prompt == tokenizer.encode(data.PROMPT.format(**example)).ids
        assert prompt[: len(prefix)] == prefix
        assert answer == [*tokenizer.encode(f" {example['label']}").ids, eos]


def test_a_long_prompt_loses_the_end_of_its_premise_alone(tokenizer):
    example = {
        "premise": "Anna bought a dog. " * 30 + "Ben saw a cat.",
        "hypothesis": "Ben saw a fox.",
        "label": 2,
    }
    whole, answer = data.encode(example, tokenizer)
    assert len(whole) > 100
    cut, cut_answer = data.encode(example, tokenizer, 100)
    assert len(cut) + len(cut_answer) == 100
    assert cut_answer == answer

    end = tokenizer.encode("\n\n### Hypothesis: Ben saw a fox.\n\n### Label:").ids
    kept = 100 - len(end) - len(answer)
    assert cut == whole[:kept] + end
    exact, _ = data.encode(example, tokenizer, len(whole) + len(answer))
    assert exact == whole


@pytest.mark.parametrize("max_length", [75, 80, 512])
def test_rows_that_were_cut_are_counted_and_those_that_just_fit_are_not(tokenizer, max_length):
    rows = list(load_examples(TINY, "validation_matched", 200))
    encoded = [data.encode(row, tokenizer, max_length) for row in rows]
    expected = sum(data.encode(row, tokenizer) != pair for row, pair in zip(rows, encoded))
    assert data.count_cut(rows, encoded, tokenizer, max_length) == expected
    assert (expected > 0) == (max_length < 87)


@pytest.mark.parametrize("premise", ["", "Anna.", "Anna bought a dog. " * 30])
def test_where_the_premise_is_gone_the_hypothesis_loses_its_end(tokenizer, premise):
    example = {"premise": premise, "hypothesis": "Ben saw a fox. " * 40, "label": 2}
    whole, answer = data.encode(example, tokenizer)
    prompt, cut_answer = data.encode(example, tokenizer, 120)
    assert len(prompt) + len(cut_answer) == 120
    assert cut_answer == answer

    # The titles are whole, and between them stands what the hypothesis begins with.
    title = tokenizer.encode(data.PREFIX + "\n\n### Hypothesis:").ids
    end = tokenizer.encode("\n\n### Label:").ids
    hypothesis = tokenizer.encode(" " + example["hypothesis"]).ids
    room = 118 - len(title) - len(end)
    assert 0 < room < len(hypothesis)
    assert prompt == title + hypothesis[:room] + end
    assert data.count_cut([example], [(prompt, answer)], tokenizer, 120) == 1


def test_many_rows_are_encoded_as_each_by_itself(tokenizer):
    rows = list(load_examples(TINY, "validation_matched", 200))
    each = [data.encode(row, tokenizer, 75) for row in rows]
    assert data.encode_batch(rows, tokenizer, 75) == each


def test_a_length_that_leaves_no_room_is_refused_and_the_least_that_does_is_not(tokenizer):
    """The least has one token of a hypothesis beside the template and the answer."""
    empty = tokenizer.encode(data.PROMPT.replace(" {premise}", "").replace(" {hypothesis}", "")).ids
    least = len(empty) + 1 + 2
    data.check_max_length(tokenizer, None)
    data.check_max_length(tokenizer, least)
    example = {"premise": "Anna.", "hypothesis": "Ben saw a fox.", "label": 2}
    prompt, answer = data.encode(example, tokenizer, least)
    assert len(prompt) + len(answer) == least
    assert set(tokenizer.encode(" Ben").ids[:1]) <= set(prompt)
    message = f"--max-length {least - 1} leaves no room for .* are {least - 1} tokens"
    with pytest.raises(ValueError, match=message):
        data.check_max_length(tokenizer, least - 1)


@pytest.mark.skipif(not SHARED.exists(), reason="no real MNLI and phi-2's tokenizer in ../shared")
def test_shared_mnli_fits_into_short_lengths(tokenizer):
    """Of 37,854 rows one has a hypothesis that is longer than 128 tokens alone, 156 than 96."""
    import pyarrow.parquet

    tokenizer = data.load_tokenizer(SHARED / "phi-2-tokenizer")
    rows = pyarrow.parquet.read_table(SHARED / "mnli" / "train.parquet").to_pylist()
    rows.sort(key=lambda row: len(row["hypothesis"]))
    longest = rows[-1000:]
    for max_length in (96, 128):
        encoded = data.encode_batch(longest, tokenizer, max_length)
        assert max(len(prompt) + len(answer) for prompt, answer in encoded) == max_length
    whole = data.encode_batch(longest, tokenizer)
    too_long = sum(len(prompt) + len(answer) > 128 for prompt, answer in whole)
    assert data.count_cut(longest, encoded, tokenizer, 128) == too_long


def test_text_in_braces_is_not_filled_in(tokenizer):
    """A premise may hold what Python's format would replace."""
    example = {"premise": "{hypothesis} {0} {", "hypothesis": "{premise}", "label": 0}
    prompt, _ = data.encode(example, tokenizer)
    expected = data.PREFIX + " {hypothesis} {0} {\n\n### Hypothesis: {premise}\n\n### Label:"
    assert prompt == tokenizer.encode(expected).ids


def test_a_tokenizer_that_cuts_answers_is_refused(tmp_path):
    vocabulary = {"<|endoftext|>": 0, " ": 1, "0": 2}
    cutting = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    cutting.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="cuts the label ' 0' into several tokens"):
        data.load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer") as raised:
        data.load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tokenizers_own_truncation_padding_and_template_are_off(tiny, tokenizer, tmp_path):
    """Programs that train store them in the file, where they would change our prompts."""
    stored = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    stored.enable_truncation(8)
    stored.enable_padding(length=64)
    template = {"single": f"$A {data.EOS}", "special_tokens": [(data.EOS, 0)]}  # add_eos_token
    stored.post_processor = processors.TemplateProcessing(**template)
    stored.save(str(tmp_path / "tokenizer.json"))
    prompt = data.PROMPT.format(premise="Anna bought a dog.", hypothesis="Anna has an animal.")
    assert data.load_tokenizer(tmp_path).encode(prompt).ids == tokenizer.encode(prompt).ids


# -----------------------------------------------------------------------------
# Reading a completion


@pytest.mark.parametrize(
    "text, label",
    [
        (" 0", 0),
        (" 1<|endoftext|>", 1),
        ("\n\n### Label: 2\n\n### Label: 1", 2),
        ("10", 10),
        ("1.5", 1),
        ("1,234,5", 1234),
        ("1234", 123),
        ("maybe 2 or 1", 2),
        ("label2", 2),
        ("yes", -1),
        ("", -1),
    ],
)
def test_the_first_number_is_the_answer(text, label):
    assert data.parse(text) == label


@given(st.integers(0, 999), st.text("abc .:\n#"), st.text())
def test_any_text_before_without_digits_and_any_after_a_space_changes_nothing(
    number, before, after
):
    assert data.parse(f"{before}{number} {after}") == number


@pytest.mark.parametrize(
    "completion, expected",
    [
        (" 1", False),
        (" 1\n", True),
        (" 12", False),
        ("123", False),
        ("1234", True),
        ("1,", False),
        ("1,23", False),
        ("1,23 ", True),
        ("1.", True),
        ("1\ufffd", False),
        ("no", False),
        ("", False),
    ],
)
def test_a_completion_is_settled_when_its_first_number_has_ended(completion, expected):
    assert data.is_settled(completion) == expected


@given(st.text("012 .,#a\ufffd"), st.text("0123456789,. a"))
def test_what_follows_a_settled_completion_cannot_change_the_answer(completion, more):
    if data.is_settled(completion):
        assert data.parse(completion + more) == data.parse(completion)


# -----------------------------------------------------------------------------
# The order of rows


def test_each_epoch_takes_every_row_once_and_a_run_can_go_on_at_any_batch():
    import datasets

    rows = datasets.Dataset.from_list(
        [{"premise": "p" * (idx % 7), "hypothesis": "h", "idx": idx} for idx in range(10)]
    )

    def take(count: int, **options) -> list[list[int]]:
        lists = itertools.islice(data.rows_of_steps(rows, 4, **options), count)
        return [[row["idx"] for row in examples] for examples in lists]

    first = take(9, seed=3)
    epochs = [first[start] + first[start + 1] + first[start + 2] for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert epochs[0] != epochs[1]
    sizes = [len(examples) for examples in first[:3]]
    assert sizes == [4, 4, 2], "the last rows of an epoch are not dropped"
    assert take(5, seed=3, start=4) == first[4:]
    assert take(9, seed=4) != first


def test_a_step_reads_its_own_rows_alone():
    """Of hundreds of thousands of rows nobody waits for all texts before the first step."""

    class Noted(Rows):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    asked = []
    rows = Noted(load_examples(TINY, "train").table)
    step = next(data.rows_of_steps(rows, 16, seed=0))
    assert sorted(asked) == sorted(row["row"] for row in step)


def test_the_rows_of_a_step_come_shortest_first():
    """Then the batches that it is cut into hold rows of similar length: attention pads within."""
    examples = load_examples(TINY, "train")
    numbers = set()
    for step in itertools.islice(data.rows_of_steps(examples, 64, seed=0), 20):
        lengths = [len(row["premise"]) + len(row["hypothesis"]) for row in step]
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 10
        for row in step:
            assert row["premise"] == examples[row["row"]]["premise"], "`row` is its number"
            numbers.add(row["row"])
    assert len(numbers) == 20 * 64


# -----------------------------------------------------------------------------
# Batches

ENCODED = [([5, 6, 7, 8], [9, 0]), ([5, 6, 7, 8, 3, 4], [1, 0])]


def test_evaluation_takes_the_rows_of_a_premise_together_and_long_ones_first():
    examples = {"premise": ["a", "b", "a", "c", "b", "a"]}
    prompts = [[0] * length for length in (3, 9, 4, 1, 2, 5)]
    assert data.by_premise(examples, prompts) == [[1, 4], [0, 2, 5], [3]]


def test_a_batch_takes_the_prefix_once_and_predicts_the_answers():
    batch = data.collate(ENCODED, prefix_length=2, loss="answer")
    #                           prefix  row 0    row 1
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 7, 8, 3, 4, 1]
    assert batch.lengths == [3, 5]
    assert batch.prefix_length == 2
    assert batch.last == 2
    assert batch.next_ids.tolist() == [9, 0, 1, 0]


def test_a_batch_of_whole_rows_predicts_the_answers_or_every_id():
    answer = data.collate(ENCODED, prefix_length=0, loss="answer")
    full = data.collate(ENCODED, prefix_length=0, loss="full")
    for batch in (answer, full):
        assert batch.ids.tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 8, 3, 4, 1]
        assert batch.lengths == [5, 7]
        assert batch.prefix_length == 0
    assert answer.last == 2
    assert answer.next_ids.tolist() == [9, 0, 1, 0]
    assert full.last is None
    assert full.next_ids.tolist() == [6, 7, 8, 9, 0, 6, 7, 8, 3, 4, 1, 0]


def test_the_full_loss_needs_whole_rows():
    with pytest.raises(ValueError, match="the full loss is on the prefix too"):
        data.collate(ENCODED, prefix_length=2, loss="full")


@pytest.mark.parametrize("loss, prefix", [("answer", 0), ("answer", 5), ("full", 0)])
@torch.no_grad()
def test_the_loss_is_the_mean_over_the_targets_however_they_fall_into_batches(
    tiny, tokenizer, loss, prefix
):
    model = ours(tiny, torch.float32)
    encoded = [data.encode(example, tokenizer) for example in load_examples(TINY, "train", 8)]
    by_target = []  # each row by itself, by the definition of the loss
    for prompt, answer in encoded:
        ids = torch.tensor(prompt + answer)
        losses = F.cross_entropy(model(ids)[:-1], ids[1:], reduction="none")
        if loss == "answer":
            losses = losses[-2:]
        by_target += losses.tolist()

    for sizes in ([8], [3, 5], [1] * 8):
        total = 0.0
        targets = 0
        rows = iter(encoded)
        for size in sizes:
            batch = data.collate(list(itertools.islice(rows, size)), prefix, loss)
            total += train.batch_loss(model, batch).item()
            targets += len(batch.next_ids)
        assert targets == len(by_target)
        # fp32, summed in two orders.
        assert total / len(by_target) == pytest.approx(sum(by_target) / len(by_target), abs=1e-5)
