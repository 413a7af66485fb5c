"""support/packing.py: many rows at once, and generation, beside phi2.MaskedRows."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, distance, ours, reference
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import data
import eval as evaluation
import lora
import phi2
import train
from support import packing
from support.examples import load_examples

TINY_DATA = str(ROOT / "tiny" / "data")
EOS = 0  # the id of the end of text in tiny/model
VOCABULARY = 1000  # ids of tiny/model's tokenizer; its head has 1,024

# Two orders of summation in fp32, through six layers. Measured: 2e-6 and below.
TOLERANCE = 1e-5


def drawn_ids(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Rows of random ids, none of which is the end of text."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


def flattened(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def with_random_adapters(model: phi2.Phi2) -> phi2.Phi2:
    """Adapters whose B is random too: at B = 0, A has no gradient."""
    lora.inject(model, lora.LoRAConfig(dropout=0.0))
    torch.manual_seed(1)
    for parameter in lora.lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_generation_of_many_rows_gives_what_the_plain_loop_gives(tiny):
    model = with_random_adapters(ours(tiny, torch.float32)).eval()
    prompts = drawn_ids([12, 3, 8, 12])
    prompts[3][:6] = prompts[0][:6]  # they begin alike
    found, _ = evaluation.generate(model, prompts, [], 9, 1024, is_finished=lambda ids: False)
    assert found == [phi2.generate(model, prompt, 9) for prompt in prompts]


# -----------------------------------------------------------------------------
# Packed rows

# On a CPU attention takes more rows than packing.ROWS_AT_ONCE in parts.
FEW = [3, 17, 9, 30, 2, 4]
SEED = torch.Generator().manual_seed(2)
MANY = torch.randint(2, 40, (2 * packing.ROWS_AT_ONCE + 5,), generator=SEED).tolist()
LENGTHS = pytest.mark.parametrize("lengths", [FEW, MANY], ids=["few rows", "many rows"])


@LENGTHS
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize("last", [None, 2])
def test_packed_rows_give_what_the_mask_says(tiny, lengths, prefix, last):
    """Logits, and gradients of the adapters: all rows at once, in either layout."""
    model = with_random_adapters(ours(tiny, torch.float32))
    (ids,) = drawn_ids([prefix + sum(lengths)])
    found = []
    for layout in (packing.PackedRows(lengths, prefix), phi2.MaskedRows(lengths, prefix)):
        logits = model(torch.tensor(ids), layout, last)
        F.cross_entropy(logits, logits.argmin(dim=-1)).backward()
        gradients = [value.grad for value in lora.lora_parameters(model).values()]
        found.append([logits.detach(), *(gradient.clone() for gradient in gradients)])
        model.zero_grad()
    packed, masked = found
    assert packed[0].shape == masked[0].shape == (2 * len(lengths) if last else len(ids), 1024)
    for here, there in zip(packed, masked):
        assert distance(here, there) < TOLERANCE


@LENGTHS
@pytest.mark.parametrize("prefix_length", [0, 1, 5])
@torch.no_grad()
def test_packed_rows_behind_a_prefix_give_the_logits_of_each_row_alone(
    tiny, lengths, prefix_length
):
    mine = ours(tiny, torch.float32)
    (prefix,) = drawn_ids([prefix_length], seed=1)
    own = drawn_ids(lengths)
    alone = [mine(torch.tensor(prefix + row)) for row in own]

    ids = torch.tensor(prefix + flattened(own))
    packed = mine(ids, packing.PackedRows(lengths, prefix_length))
    of_prefix, of_rows = packed.split([prefix_length, sum(lengths)])
    for row, expected in zip(of_rows.split(lengths), alone):
        assert distance(row, expected[prefix_length:]) < TOLERANCE
        if prefix:
            assert distance(of_prefix, expected[:prefix_length]) < TOLERANCE

    for last in (1, 2):
        ends = mine(ids, packing.PackedRows(lengths, prefix_length), last)
        assert len(ends) == last * len(lengths)
        for row, expected in zip(ends.split(last), alone):
            assert distance(row, expected[-last:]) < TOLERANCE


# -----------------------------------------------------------------------------
# Rows that begin alike


def branching_rows(stems: int = 4) -> list[list[int]]:
    """Three rows to each stem, as hypotheses to a premise, mixed. And two rows that are equal, one
    that is the beginning of another, and one that has nothing in common with any.
    """
    rows = []
    for number, length in enumerate([9, 17, 2, 30][:stems]):
        (stem,) = drawn_ids([length], seed=10 + number)
        rows += [stem + tail for tail in drawn_ids([3, 12, 5], seed=20 + number)]
    rows += [rows[1], rows[1][:-3], drawn_ids([6], seed=40)[0]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[number] for number in order]


def test_a_tree_holds_what_rows_begin_with_once():
    ids, token_of = packing.fold([[7, 8, 9], [7, 8, 5, 9], [8], [7, 8]])
    assert ids == [7, 8, 9, 5, 9, 8]
    assert token_of == [0, 1, 2, 0, 1, 3, 4, 5, 0, 1]
    rows = branching_rows()
    ids, token_of = packing.fold(rows)
    assert [ids[number] for number in token_of] == flattened(rows)
    assert len(ids) == len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})
    assert len(ids) < 0.6 * len(token_of)


@pytest.mark.parametrize("stems", [1, 4], ids=["few rows", "many rows"])
@pytest.mark.parametrize("prefix_length", [0, 5])
@torch.no_grad()
def test_rows_that_begin_alike_have_the_logits_of_each_row_alone(tiny, stems, prefix_length):
    mine = with_random_adapters(ours(tiny, torch.float32))
    (prefix,) = drawn_ids([prefix_length], seed=1)
    rows = branching_rows(stems)
    alone = [mine(torch.tensor(prefix + row))[prefix_length:] for row in rows]

    own_ids, token_of = packing.fold(rows)
    layout = packing.PackedRows([len(row) for row in rows], prefix_length, token_of=token_of)
    ids = torch.tensor(prefix + own_ids)
    found = mine(ids, layout)
    assert len(found) == prefix_length + len(own_ids)
    of_rows = found[prefix_length:][token_of]
    assert distance(of_rows, torch.cat(alone)) < TOLERANCE
    for last in (1, 2):
        expected = torch.cat([logits[-last:] for logits in alone])
        assert distance(mine(ids, layout, last), expected) < TOLERANCE


# With a long prefix rows and tree have as many tokens as the call, or fewer.
@pytest.mark.parametrize("rows", [branching_rows(), [[5, 6], [5, 7]]], ids=["many", "two"])
@pytest.mark.parametrize("prefix_length", [0, 1, 2, 5])
def test_rows_that_begin_alike_have_the_gradients_of_each_row_alone(tiny, rows, prefix_length):
    mine = with_random_adapters(ours(tiny, torch.float32)).eval()
    (prefix,) = drawn_ids([prefix_length], seed=1)

    def gradients(last_logits: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(last_logits, torch.arange(len(rows)))
        return torch.autograd.grad(loss, list(lora.lora_parameters(mine).values()))

    expected = gradients(torch.cat([mine(torch.tensor(prefix + row))[-1:] for row in rows]))
    ids, token_of = packing.fold(rows)
    layout = packing.PackedRows([len(row) for row in rows], prefix_length, token_of=token_of)
    found = gradients(mine(torch.tensor(prefix + ids), layout, last=1))
    for mine_gradient, gradient in zip(found, expected):
        assert distance(mine_gradient, gradient) < TOLERANCE


class OnGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@pytest.mark.parametrize("prefix_length", [0, 5])
def test_the_fused_attention_of_gpus_is_the_one_written_out_for_cpus(prefix_length):
    torch.manual_seed(0)
    lengths = [3, 7, 5]
    rows = packing.PackedRows(lengths, prefix_length)
    q = torch.randn(3, 7, 2, 8)  # three rows, seven places, two heads, eight dimensions
    k, v = torch.randn(2, 3, prefix_length + 7, 2, 8)
    mask = rows.masks[-1]
    written_out = packing.attention(q.requires_grad_(), k, v, mask).detach()
    q = q.detach()
    fused = packing.attention(q.as_subclass(OnGpu), k, v, mask).as_subclass(Tensor)
    # What a GPU gets instead of a mask. On a CPU torch makes a mask of it.
    form = packing.causal_lower_right(7, prefix_length + 7)
    by_form = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=form
    ).transpose(1, 2)
    for row, length in enumerate(lengths):  # nobody reads what stands behind a row
        for result in (fused, by_form):
            assert distance(result[row, :length], written_out[row, :length]) < 1e-6  # one layer


@torch.no_grad()
def test_the_last_token_of_each_row_sees_as_much_in_generation(tiny):
    mine = ours(tiny, torch.float32).eval()
    results = []
    for last in (1, None):
        rows = packing.PackedRows([5, 2, 3], prefix_length=2, room=4)
        mine(torch.arange(12), rows)
        decoder = packing.Decoder(mine, rows)
        decoder.keep([0, 2])
        decoder.layout.advance()
        results.append(mine(torch.tensor([7, 8]), decoder.layout, last))
    assert distance(*results) < 1e-6


@torch.no_grad()
def test_rows_may_go_on_in_another_order_as_long_as_there_is_room(tiny):
    mine = ours(tiny, torch.float32).eval()
    rows = packing.PackedRows([2, 1], prefix_length=2, room=2)
    mine(torch.tensor([5, 6, 7, 8, 9]), rows)
    decoder = packing.Decoder(mine, rows)
    decoder.keep([1, 0, 1])
    decoder.run([11, 12, 13])
    found = decoder.run([14, 15, 16])
    whole = [[5, 6, 9, 11, 14], [5, 6, 7, 8, 12, 15], [5, 6, 9, 13, 16]]
    expected = [mine(torch.tensor(row))[-1] for row in whole]
    assert distance(found, torch.stack(expected)) < TOLERANCE
    with pytest.raises(ValueError, match="no room for more than 2 new tokens"):
        decoder.run([1, 2, 3])


@torch.no_grad()
def test_a_recorded_step_of_generation_gives_what_a_new_step_gives(tiny):
    """A CUDA graph does the same operations with the same tensors again, and nothing of Python's.

    So does what make_fx records, on a CPU.
    """
    mine = with_random_adapters(ours(tiny, torch.float32, "nf4")).eval()

    def begun() -> packing.Decoder:
        rows = packing.PackedRows([2, 1], prefix_length=2, room=4)
        mine(torch.tensor([5, 6, 7, 8, 9]), rows)
        decoder = packing.Decoder(mine, rows)
        decoder.run([11, 12])
        return decoder

    anew = begun()
    repeated = begun()
    repeated.ids.copy_(torch.tensor([13, 14]))
    recorded = make_fx(lambda: repeated.step())()  # unlike a GPU it also runs the step
    anew.run([13, 14])
    for ids in ([15, 16], [17, 18]):
        repeated.ids.copy_(torch.tensor(ids))
        assert torch.equal(recorded(), anew.run(ids))


class RecordingThatFails:
    """A torch.cuda.CUDAGraph. (On a CPU it has to fail before the step, which would run.)"""

    def capture_begin(self, *_, **options) -> None:
        raise torch.AcceleratorError("CUDA error: operation not permitted")


@pytest.fixture
def streams(monkeypatch) -> list[str]:
    """The current stream is the last of these. torch.cuda.graph is torch's own."""
    current = ["the first"]

    class Stream:
        def __init__(self, name: str = "of the recording"):
            self.name = name

        def __enter__(self) -> None:
            current.append(self.name)

        def __exit__(self, *_) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordingThatFails)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    return current


@torch.no_grad()
def test_where_no_step_can_be_recorded_generation_goes_on_as_before(tiny, streams):
    mine = ours(tiny, torch.float32).eval()
    logits = []
    for records in (True, False):
        rows = packing.PackedRows([4], room=4)
        mine(torch.tensor([5, 6, 7, 8]), rows)
        decoder = packing.Decoder(mine, rows)
        decoder.records = records
        decoder.run([9])
        with pytest.warns(UserWarning, match="no CUDA graph") if records else nullcontext():
            decoder.run([10])
        logits.append(decoder.run([11]))
    assert torch.equal(*logits)
    assert not mine.uses_graphs
    # torch has left its own stream as the current one.
    assert streams == ["the first", "of the recording", "the first"]


@torch.no_grad()
def test_a_full_memory_while_a_step_is_recorded_is_an_error_and_graphs_stay_on(
    tiny, streams, monkeypatch
):
    """eval.answer then takes fewer rows, whose step may be recorded."""

    def capture_begin(self, *_, **options) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RecordingThatFails, "capture_begin", capture_begin)
    mine = ours(tiny, torch.float32).eval()
    rows = packing.PackedRows([4], room=4)
    mine(torch.tensor([5, 6, 7, 8]), rows)
    decoder = packing.Decoder(mine, rows)
    decoder.records = True
    decoder.run([9])
    with pytest.raises(torch.OutOfMemoryError):
        decoder.run([10])
    assert mine.uses_graphs
    assert streams[-1] == "the first"


class Recording(packing.Decoder):
    """Takes its own step for a recorded one. So finished rows stay until most are finished."""

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.records = True
        self.graph = self

    def replay(self) -> None:
        self.logits = self.step()


def test_finished_rows_that_stay_in_the_batch_change_no_completion(tiny, monkeypatch):
    mine = with_random_adapters(ours(tiny, torch.float32)).eval()
    prompts = drawn_ids([5, 9, 7, 3, 8, 6, 4])

    def completions(is_finished) -> list[list[int]]:
        return evaluation.generate(mine, prompts, [], 12, VOCABULARY, is_finished)[0]

    whole = completions(lambda ids: False)
    # Each ends at another time, and the first row last.
    lengths = {tuple(ids[:length]) for ids, length in zip(whole, [12, 2, 5, 1, 9, 3, 3])}
    expected = completions(lambda ids: tuple(ids) in lengths)
    assert list(map(len, expected)) == [12, 2, 5, 1, 9, 3, 3]
    monkeypatch.setattr(packing, "Decoder", Recording)
    assert completions(lambda ids: tuple(ids) in lengths) == expected


@pytest.mark.parametrize("rows, recordings", [(1, 1), (8, 2), (64, 3), (512, 4)])
def test_few_steps_of_a_batch_are_recorded_however_its_rows_end(rows, recordings):
    class Counting(packing.Decoder):
        records = True
        kept = 0

        def __init__(self):
            pass

        def keep(self, rows: list[int]) -> None:
            self.kept += 1

    decoder = Counting()
    in_batch = rows
    for unfinished in range(rows - 1, 0, -1):  # one row after another ends
        kept = decoder.drop([row >= unfinished for row in range(in_batch)])
        in_batch = len(kept)
        assert kept == list(range(in_batch)) and unfinished <= in_batch < 8 * unfinished
    assert 1 + decoder.kept == recordings


def test_a_row_without_that_many_tokens_is_an_error(tiny):
    mine = ours(tiny, torch.float32)
    with pytest.raises(ValueError, match="a row has 1 tokens, fewer than the last 2"):
        mine(torch.tensor([5, 6, 7]), packing.PackedRows([2, 1]), last=2)


A_FEW = 8
A_LOT = packing.ROWS_AT_ONCE + 5  # rows, of which a CPU takes that many at once


@pytest.fixture(scope="module", params=[A_FEW, A_LOT], ids=["few rows", "many rows"])
def encoded(tiny, request):
    """Rows of tiny/data, of different lengths."""
    tokenizer = data.load_tokenizer(tiny)
    examples = load_examples(TINY_DATA, "train", request.param)
    rows = [data.encode(example, tokenizer) for example in examples]
    assert len({len(prompt) for prompt, _ in rows}) > 4
    return rows


@pytest.fixture(scope="module")
def prefix(tiny) -> int:
    """How many ids all prompts share."""
    prefix_ids, _, _ = data.fixed_ids(data.load_tokenizer(tiny))
    return len(prefix_ids)


def adapter_gradients(model: phi2.Phi2, batch: data.Batch) -> tuple[float, list[Tensor]]:
    """The loss of a batch, and its gradients in the adapters."""
    loss = train.batch_loss(model, batch)
    parameters = list(lora.lora_parameters(model).values())
    return loss.item(), list(torch.autograd.grad(loss, parameters))


# Each value at least twice, and in one part of rows and in several all that is recomputed.
@pytest.mark.parametrize(
    "encoded, quantization, recomputed",
    [
        (A_FEW, "none", None),
        (A_FEW, "nf4", "attention"),
        (A_FEW, "none", "blocks"),
        (A_LOT, "nf4", None),
        (A_LOT, "none", "attention"),
        (A_LOT, "nf4", "blocks"),
    ],
    indirect=["encoded"],
)
def test_the_shared_prefix_gives_the_gradients_of_whole_prompts(
    tiny, encoded, prefix, quantization, recomputed
):
    mine = with_random_adapters(ours(tiny, torch.float32, quantization)).train()
    mine.model.recomputes_attention = recomputed == "attention"
    mine.model.recomputes_blocks = recomputed == "blocks"
    whole_loss, whole = adapter_gradients(mine, data.collate(encoded, 0, "answer"))
    shared_loss, shared = adapter_gradients(mine, data.collate(encoded, prefix, "answer"))
    assert shared_loss == pytest.approx(whole_loss, rel=TOLERANCE)
    for gradient, expected in zip(shared, whole):
        assert expected.norm() > 0
        assert distance(gradient, expected) < TOLERANCE


def test_a_shared_prefix_gives_the_gradients_of_the_base_too(tiny, encoded, prefix):
    """Those that an adapter on any layer is made of, and those of the prefix's own embeddings."""
    mine = ours(tiny, torch.float32)
    weights = list(mine.parameters())
    whole = train.batch_loss(mine, data.collate(encoded, 0, "answer"))
    expected = torch.autograd.grad(whole, weights)
    shared = train.batch_loss(mine, data.collate(encoded, prefix, "answer"))
    names = [name for name, _ in mine.named_parameters()]
    for name, gradient, wanted in zip(names, torch.autograd.grad(shared, weights), expected):
        assert wanted.norm() > 0
        assert distance(gradient, wanted) < TOLERANCE, name


@pytest.mark.parametrize("recomputed, most_kept", [("attention", 0.75), ("blocks", 0.4)])
# In several parts of rows behind a shared prefix, and in one part without it.
@pytest.mark.parametrize(
    "encoded, loss", [(A_LOT, "answer"), (A_FEW, "full")], indirect=["encoded"]
)
def test_checkpointing_recomputes_the_same_gradients_and_keeps_less(
    tiny, encoded, prefix, loss, recomputed, most_kept
):
    mine = with_random_adapters(ours(tiny, torch.float32, "nf4")).train()
    batch = data.collate(encoded, prefix if loss == "answer" else 0, loss)
    stored = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor.nbytes)
        return tensor

    results = []
    for choice in (False, True):
        setattr(mine.model, f"recomputes_{recomputed}", choice)
        stored.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total, gradients = adapter_gradients(mine, batch)
        results.append((total, gradients, sum(stored)))
    (plain_loss, plain, plain_bytes), (again_loss, again, again_bytes) = results
    assert again_loss == plain_loss
    for gradient, expected in zip(again, plain):
        assert torch.equal(gradient, expected)
    assert again_bytes < most_kept * plain_bytes


# -----------------------------------------------------------------------------
# No token is computed that no row holds


def count_tokens(model: phi2.Phi2, batch: data.Batch) -> dict[str, int]:
    """How many tokens enter the embeddings, the MLP of each block and the head in training."""
    modules = {"embeddings": model.model.embed_tokens, "head": model.lm_head}
    for number, block in enumerate(model.model.layers):
        modules[f"block {number}"] = block.mlp
    counts = dict.fromkeys(modules, 0)

    def hook_for(name: str):
        def count(_, inputs: tuple[Tensor]) -> None:
            counts[name] += len(inputs[0])

        return count

    for name, module in modules.items():
        module.register_forward_pre_hook(hook_for(name))
    train.batch_loss(model.train(), batch)
    return counts


def assert_no_token_too_many(tiny: Path, encoded: list, prefix: int) -> None:
    mine = with_random_adapters(ours(tiny, torch.float32))
    # The last id of an answer is predicted, and never read.
    own = [len(prompt) + len(answer) - 1 - prefix for prompt, answer in encoded]
    held = sum(own) + prefix
    targets = 2 * len(own)  # the answer, and the end of text
    counts = count_tokens(mine, data.collate(encoded, prefix, "answer"))
    assert counts == {
        "embeddings": held,
        "block 0": held,
        "block 1": held,
        "block 2": held,
        "block 3": held,
        "block 4": held,
        "block 5": targets,  # the others only give keys and values here
        "head": targets,
    }
    assert len(own) * max(own) > 1.2 * sum(own), "the rows must be ragged, or this says little"


@pytest.mark.parametrize("size", [16, 128])
def test_a_step_runs_the_ids_of_its_rows_and_one_prefix(tiny, prefix, size):
    tokenizer = data.load_tokenizer(tiny)
    rows = next(data.rows_of_steps(load_examples(TINY_DATA, "train"), size, seed=0))
    assert_no_token_too_many(tiny, [data.encode(row, tokenizer) for row in rows], prefix)


@pytest.mark.skipif(
    not (SHARED / "mnli").is_dir() or not (SHARED / "phi-2-tokenizer").is_dir(),
    reason="../shared/mnli and ../shared/phi-2-tokenizer are not there",
)
def test_shared_mnli_a_step_runs_the_ids_of_its_rows_and_one_prefix(tiny):
    """Rows as phi-2's tokenizer cuts them. Their ids are folded into the small vocabulary."""
    tokenizer = data.load_tokenizer(SHARED / "phi-2-tokenizer")
    prefix_ids, _, _ = data.fixed_ids(tokenizer)
    rows = next(data.rows_of_steps(load_examples(str(SHARED / "mnli"), "train"), 64, seed=0))
    encoded = []
    for row in rows:
        prompt, answer = data.encode(row, tokenizer)
        small_prompt = [token % VOCABULARY for token in prompt]
        small_answer = [token % VOCABULARY for token in answer]
        encoded.append((small_prompt, small_answer))
    assert_no_token_too_many(tiny, encoded, len(prefix_ids))


# -----------------------------------------------------------------------------
# Generation: the cache, and rows that leave the batch


@torch.no_grad()
def slow_generate(model: phi2.Phi2, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What eval.generate means: no cache, no batch, the whole text for each token anew."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        next_logits = model(torch.tensor(ids))[-1]
        token = next_logits[:VOCABULARY].argmax().item()
        ids.append(token)
        if token == EOS:
            break
    return ids[len(prompt) :]


def is_finished(ids: list[int]) -> bool:
    return ids[-1] == EOS


def generate(
    model: phi2.Phi2, prompts: list[list[int]], prefix: list[int], max_new_tokens: int
) -> list[list[int]]:
    completions, _ = evaluation.generate(
        model, prompts, prefix, max_new_tokens, VOCABULARY, is_finished
    )
    return completions


def prone_to_end(model: phi2.Phi2) -> phi2.Phi2:
    """A model that ends its text now and then: the base of tiny/ never does after such prompts."""
    bias = model.lm_head.bias.detach()
    bias[EOS] += 4.5
    return model


@pytest.mark.parametrize(
    "lengths, prefix_length",
    [(FEW, 0), (FEW, 5), (MANY, 5)],
    ids=["few rows", "few rows behind a prefix", "many rows behind a prefix"],
)
def test_generation_is_the_slow_generation_without_a_cache(tiny, lengths, prefix_length):
    mine = prone_to_end(ours(tiny, torch.float32))
    (prefix,) = drawn_ids([prefix_length], seed=1)
    prompts = [prefix + row for row in drawn_ids(lengths)]
    expected = [slow_generate(mine, prompt, 12) for prompt in prompts]
    ends = {len(completion) for completion in expected}
    assert len(ends) > 3, "the rows must leave at different steps, or this says little"
    assert 12 in ends
    assert generate(mine, prompts, prefix, 12) == expected
    assert generate(mine, prompts, prefix, 1) == [completion[:1] for completion in expected]


@pytest.mark.parametrize(
    "stems, prefix_length",
    [(1, 0), (4, 5)],
    ids=["few rows", "many rows behind a prefix"],
)
def test_generation_of_rows_that_begin_alike_is_the_slow_one(tiny, stems, prefix_length):
    mine = prone_to_end(ours(tiny, torch.float32))
    (prefix,) = drawn_ids([prefix_length], seed=1)
    prompts = [prefix + row for row in branching_rows(stems)]
    expected = [slow_generate(mine, prompt, 12) for prompt in prompts]
    assert len({len(completion) for completion in expected}) > 1
    assert generate(mine, prompts, prefix, 12) == expected


@torch.no_grad()
def test_the_hidden_states_of_a_generation_are_those_after_each_prompt(tiny):
    mine = ours(tiny, torch.float32)
    prefix = [5, 6, 7, 8, 9]
    prompts = [prefix + row for row in drawn_ids([3, 17, 9])]
    _, hidden = evaluation.generate(mine, prompts, prefix, 4, VOCABULARY, is_finished)
    for found, prompt in zip(mine.lm_head(hidden), prompts):
        assert distance(found, mine(torch.tensor(prompt))[-1]) < TOLERANCE


def test_a_completion_does_not_depend_on_the_batch_or_on_how_the_prompt_is_split(tiny):
    mine = prone_to_end(ours(tiny, torch.float32))
    prefix = [5, 6, 7, 8, 9]
    prompts = [prefix + row for row in drawn_ids([3, 17, 9, 30, 1, 4])]
    alone = [generate(mine, [prompt], [], 8)[0] for prompt in prompts]
    assert generate(mine, prompts, [], 8) == alone
    assert generate(mine, prompts, prefix, 8) == alone
    assert generate(mine, prompts, prefix[:2], 8) == alone
    assert generate(mine, prompts[::-1], prefix, 8) == alone[::-1]


@torch.no_grad()
def test_greedy_completions_of_200_prompts_are_those_of_transformers(tiny):
    mine = ours(tiny, torch.float32)
    theirs = reference(tiny, torch.float32).eval()
    new_tokens = 16
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 50, (100,), generator=generator).tolist()
    tokenizer = data.load_tokenizer(tiny)
    examples = load_examples(TINY_DATA, "validation_matched", 100)
    prompts = drawn_ids(lengths) + [data.encode(example, tokenizer)[0] for example in examples]
    found = generate(mine, prompts, [], new_tokens)

    # transformers wants the prompts padded on the left. Those of like lengths need least of it.
    pairs = sorted(zip(prompts, found), key=lambda pair: len(pair[0]))
    for start in range(0, len(pairs), 50):
        batch = pairs[start : start + 50]
        width = len(batch[-1][0])
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        texts = theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=EOS,
            suppress_tokens=list(range(VOCABULARY, 1024)),
        )
        for (_, completion), text in zip(batch, texts[:, width:].tolist(), strict=True):
            assert completion == text[: len(completion)]
            assert len(completion) == new_tokens or completion[-1] == EOS
    assert len({tuple(row) for row in found}) > 20, "the completions must differ"


@torch.no_grad()
def test_ids_beyond_the_tokenizer_are_never_written(tiny):
    mine = ours(tiny, torch.float32)
    mine.lm_head.bias[VOCABULARY:] = 1e4  # the head's untrained rows would win every time
    assert mine(torch.tensor([1, 2, 3]))[-1].argmax() >= VOCABULARY
    (completion,) = generate(mine, [[1, 2, 3]], [], 8)
    assert max(completion) < VOCABULARY
