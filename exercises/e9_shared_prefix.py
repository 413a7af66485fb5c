"""Exercise 9: the shared prefix. 60 minutes.

All prompts of a task begin with the same instruction, which is often longer than what follows. If
each row runs whole, a batch of 16 prompts computes the instruction 16 times. But in a causal
model (arXiv:1706.03762, section 3.2.3) a token sees only the tokens before it. The hidden states
of the prefix do not depend on what follows, so computing them once is enough for all rows,
provided that each row sees the prefix and itself, and no other row. In the backward pass the
prefix then receives the sum of the gradients of all rows, as the chain rule demands.

So the batch becomes one long row, the prefix once and then row after row, with

    positions    those that each token would have if its row were alone behind the prefix
    mask         for a prefix of two tokens and rows of two tokens and of one, with an x where
                 the token on the left sees the token above:

               P0 P1 a0 a1 b0
        P0      x
        P1      x  x
        a0      x  x  x
        a1      x  x  x  x
        b0      x  x        x

    sources      for each token of the rows, the token whose logits predict it. In a single row
                 this is the token before it. Behind a shared prefix this is mostly so.

The loss is the mean over the tokens of the rows; the tokens of the prefix have none. The tests
run transformers' phi on each row alone and on your one row: the logits, the loss and each
gradient must be equal.

What you should see:

    >>> shared = share([1, 2], [[3, 4], [5]])
    >>> print("\\n".join("".join(".x"[seen] for seen in row) for row in shared.mask.tolist()))
    x....
    xx...
    xxx..
    xxxx.
    xx..x
    >>> shared.sources.tolist()
    [1, 2, 1]
    >>> rows = [[7] * 50] * 16    # this project's instruction has 51 tokens with phi-2
    >>> len(share([1] * 51, rows).ids), 16 * (51 + 50)
    (851, 1616)
"""

from typing import NamedTuple

from torch import Tensor


class Shared(NamedTuple):
    """A prefix and rows behind it, as one row of N tokens."""

    ids: Tensor  # (N,) the prefix, then row after row
    positions: Tensor  # (N,)
    mask: Tensor  # (N, N), torch.bool: mask[i, j] says whether token i sees token j
    sources: Tensor  # (N - prefix,) which token's logits predict each token of the rows


def share(prefix: list[int], rows: list[list[int]]) -> Shared:
    """Returns the one row. The prefix and each row have at least one token."""
    raise NotImplementedError("exercise 9: share")


def loss(logits: Tensor, prefix: list[int], shared: Shared) -> Tensor:
    """Returns the mean cross-entropy over the tokens of the rows, for logits (N, vocabulary)."""
    raise NotImplementedError("exercise 9: loss")
