"""Exercise 9: the shared prefix. 60 minutes.

All prompts of a task begin with the same instruction, often longer than what follows. Run row
by row, a batch of 16 prompts computes it 16 times. But in a causal model (arXiv:1706.03762,
section 3.2.3) a token sees only what stands before it. What the prefix's tokens compute does
not depend on what follows: once is enough, for all rows, if each row sees the prefix and itself
and no other row. In the backward pass the prefix then gathers the gradients of all rows, which
is what the chain rule asks for.

So the batch becomes one long row, the prefix once and then row after row, with

    positions    which each token would have, were its row alone behind the prefix
    mask         for a prefix of two tokens and rows of two and of one, with an x where the
                 token on the left sees the one above:

               P0 P1 a0 a1 b0
        P0      x
        P1      x  x
        a0      x  x  x
        a1      x  x  x  x
        b0      x  x        x

    sources      for each token of the rows, the one whose logits predict it. In a row alone that
                 is the token before it. Behind a shared prefix it mostly is.

The loss is on the rows' tokens, not on the prefix's: the mean over all of them. The tests run
transformers' phi on rows alone and on your one row: logits, loss and each gradient are equal.

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
    >>> rows = [[7] * 50] * 16    # behind phi-2's 51 tokens of this project's instruction
    >>> len(share([1] * 51, rows).ids), 16 * (51 + 50)
    (851, 1616)
"""

from typing import NamedTuple

from torch import Tensor


class Shared(NamedTuple):
    """A prefix and rows behind it, as one row of N tokens."""

    ids: Tensor  # (N,) the prefix, then row after row
    positions: Tensor  # (N,)
    mask: Tensor  # (N, N), torch.bool: whether token i, the first index, sees token j
    sources: Tensor  # (N - prefix,) for each token of the rows, the one whose logits predict it


def share(prefix: list[int], rows: list[list[int]]) -> Shared:
    """Returns the one row. Prefix and rows have a token at least."""
    raise NotImplementedError("exercise 9: share")


def loss(logits: Tensor, prefix: list[int], shared: Shared) -> Tensor:
    """Returns the mean cross-entropy over the rows' tokens, for logits (N, vocabulary)."""
    raise NotImplementedError("exercise 9: loss")
