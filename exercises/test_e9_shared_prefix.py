"""Exercise 9, compared with transformers' phi, which runs each row alone."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exercises.judge import check, check_close

PREFIX = [5, 6, 7, 8]
ROWS = [[11, 12, 13], [21, 22, 23, 24, 25], [31], [11, 12, 43]]
# Which token sees which, for a prefix of two and rows of two and of one.
SMALL = ([1, 2], [[3, 4], [5]])
TOKENS = ["P0", "P1", "a0", "a1", "b0"]
MASK = ["x....", "xx...", "xxx..", "xxxx.", "xx..x"]


@functools.cache
def model() -> nn.Module:
    """A small phi with random weights."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        partial_rotary_factor=0.5,
        attn_implementation="sdpa",
    )
    phi = PhiForCausalLM(config)
    for parameter in phi.parameters():
        nn.init.normal_(parameter, std=0.3)  # larger than usual: a mistake shows
    return phi.eval()


def logits_of(shared) -> Tensor:
    """Returns the logits (N, vocabulary) of one row of N tokens with this mask."""
    run = model()(
        input_ids=shared.ids[None],
        position_ids=shared.positions[None],
        attention_mask=shared.mask[None, None],
    )
    return run.logits[0]


@functools.cache
def alone() -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns loss, gradients and logits of the rows' own tokens, each row run alone."""
    losses = []
    logits = []
    for row in ROWS:
        ids = torch.tensor(PREFIX + row)
        of_row = model()(input_ids=ids[None]).logits[0]
        # Each token is predicted by the one before it: the row's first by the prefix's last.
        predicting = of_row[len(PREFIX) - 1 : -1]
        losses.append(F.cross_entropy(predicting, ids[len(PREFIX) :], reduction="sum"))
        logits.append(of_row[len(PREFIX) :])
    loss = sum(losses) / sum(map(len, ROWS))
    gradients = torch.autograd.grad(loss, list(model().parameters()))
    return loss.detach(), list(gradients), torch.cat(logits).detach()


def drawn(mask: Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_ids_and_positions(answer):
    shared = answer.share(PREFIX, ROWS)
    ids = PREFIX + sum(ROWS, [])
    check(
        shared.ids.tolist() == ids,
        f"The ids are {shared.ids.tolist()}\nand should be the prefix once, then row after row: "
        f"{ids}.",
    )
    found = shared.positions.tolist()
    expected = list(range(4)) + [4 + place for row in ROWS for place in range(len(row))]
    cure = ""
    if found == list(range(len(ids))):
        cure = "\nThey run on from row to row. Each row starts directly after the prefix."
    elif found[4:] == [place for row in ROWS for place in range(len(row))]:
        cure = "\nRows start at 0. They should start after the prefix."
    check(found == expected, f"The positions are {found}\nand should be {expected}.{cure}")


def test_the_mask(answer):
    mask = answer.share(*SMALL).mask
    check(
        mask.dtype == torch.bool and mask.shape == (5, 5),
        f"The mask is {mask.dtype} of shape {tuple(mask.shape)}, not torch.bool of (5, 5).",
    )
    found = drawn(mask)
    wrong = [
        f"{TOKENS[i]} {'sees' if mask[i, j] else 'does not see'} {TOKENS[j]}"
        for i in range(5)
        for j in range(5)
        if found[i][j] != MASK[i][j]
    ]
    cure = f"It is wrong that {', '.join(wrong)}."
    if torch.equal(mask.T, torch.tensor([[cell == "x" for cell in row] for row in MASK])):
        cure = "It is transposed: mask[i, j] says whether token i sees token j."
    sides = "\n".join(f"    {here}      {there}" for here, there in zip(found, MASK))
    check(
        found == MASK,
        "The mask for the prefix P0 P1 and the rows a0 a1 and b0 is on the left, and should be as "
        f"on the right.\n{sides}\n{cure}",
    )


def test_the_rows_have_the_logits_that_they_have_alone(answer):
    shared = answer.share(PREFIX, ROWS)
    _, _, expected = alone()
    found = logits_of(shared)[len(PREFIX) :]
    check_close(found, expected, "the rows' logits behind the prefix")


def test_the_loss_is_the_one_of_rows_alone(answer):
    shared = answer.share(PREFIX, ROWS)
    logits = logits_of(shared)
    found = answer.loss(logits, PREFIX, shared)
    expected, _, _ = alone()
    own = shared.ids[4:]
    cures = {
        "It takes the logits of the token before each in the flat order. For the first token of "
        "a row that is the last of another row; the prefix's last should predict it.": (
            F.cross_entropy(logits[3:-1], own)
        ),
        "It takes each token's own logits, which predict the one after it.": (
            F.cross_entropy(logits[4:], own)
        ),
        "It is a sum: it should be the mean over the targets.": expected * len(own),
        "It is the mean of each row's mean: it should be the mean over all targets.": torch.stack(
            [part.mean() for part in losses(logits, own).split([len(row) for row in ROWS])]
        ).mean(),
    }
    check_close(found, expected, "the loss", cures)


def losses(logits: Tensor, own: Tensor) -> Tensor:
    """Returns the loss of each target (12,), for rows of 3, 5, 1 and 3 tokens behind 4."""
    sources = torch.tensor([3, 4, 5, 3, 7, 8, 9, 10, 3, 3, 13, 14])
    return F.cross_entropy(logits[sources], own, reduction="none")


def test_the_gradients_are_those_of_rows_alone(answer):
    shared = answer.share(PREFIX, ROWS)
    loss = answer.loss(logits_of(shared), PREFIX, shared)
    found = torch.autograd.grad(loss, list(model().parameters()))
    _, expected, _ = alone()
    for (name, _), gradient, wanted in zip(model().named_parameters(), found, expected):
        # A key's bias has no gradient but for rounding: the softmax does not change with it.
        if wanted.norm() > 1e-4:
            # Measured: 3e-6. The prefix's is a sum over all rows, in another order than alone.
            check_close(gradient, wanted, f"the gradient of {name}", tolerance=1e-4)
