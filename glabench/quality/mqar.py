"""Multi-query associative recall: pairs of keys and values, then the keys again (Zoology §3, appendix E).

`draw` makes examples for training, fast and the same on every device; `draw_reference` makes those of the
reference program, bit for bit, row by row: the test set.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POWER = 0.01  # a: a query's slot i has probability proportional to a (i + 1)^(a - 1)
ROWS = 4096  # drawn at a time: a table [ROWS, words of one kind] of int32 is 64 MiB at 8192 words
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Examples:
    """Token ids, and where which answer is due.

    Shapes: tokens [N, T]; queries (positions) and answers (token ids) [N, K], in the order of the pairs.
    """

    tokens: Tensor
    queries: Tensor
    answers: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> "Examples":
        return Examples(self.tokens.to(device), self.queries.to(device), self.answers.to(device))

    def labels(self) -> Tensor:
        """[N, T]: the answer at each query's position, -100 elsewhere."""
        empty = torch.full(self.tokens.shape, IGNORED, dtype=torch.int64, device=self.tokens.device)
        return empty.scatter_(1, self.queries.long(), self.answers.long())


def slot_probabilities(seqlen: int, pairs: int) -> np.ndarray:
    """Probability of each of the (T - 2K) / 2 places a query can stand at, nearest first."""
    weights = POWER * np.arange(1, (seqlen - 2 * pairs) // 2 + 1) ** (POWER - 1)
    return weights / weights.sum()


def draw(count: int, seqlen: int, pairs: int, vocab: int, seed: int) -> Examples:
    """`count` examples from a generator on the CPU, so that every device trains on the same ones.

    Shapes: see Examples. Keys are of 1 .. vocab / 2 - 1, values of vocab / 2 .. vocab - 1, 0 fills.
    Source: Zoology §3 and appendix E; slots without replacement by the largest of log p + Gumbel noise.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = 1 + _distinct(count, pairs, vocab // 2 - 1, generator)
    values = vocab // 2 + _distinct(count, pairs, vocab - vocab // 2, generator)
    log_p = torch.from_numpy(slot_probabilities(seqlen, pairs)).log()
    slots = torch.empty(count, pairs, dtype=torch.int32)
    for rows in slots.split(ROWS):
        noise = torch.empty(len(rows), len(log_p), dtype=log_p.dtype).exponential_(generator=generator)
        rows.copy_((log_p - noise.log()).topk(pairs).indices)
    return _lay_out(keys, values, slots, seqlen)


def _distinct(count: int, size: int, kinds: int, generator: torch.Generator) -> Tensor:
    """[count, size] of 0 .. kinds - 1, distinct in a row: the first steps of a Fisher-Yates shuffle."""
    drawn = torch.empty(count, size, dtype=torch.int32)
    for rows in drawn.split(ROWS):
        table = torch.arange(kinds, dtype=torch.int32).repeat(len(rows), 1)
        for i in range(size):
            j = torch.randint(i, kinds, (len(rows), 1), generator=generator)
            rows[:, i : i + 1] = table.gather(1, j)
            table.scatter_(1, j, table[:, i : i + 1].clone())
    return drawn


def draw_reference(count: int, seqlen: int, pairs: int, vocab: int, seed: int) -> Examples:
    """The reference program's examples for this seed: numpy's legacy stream, a row at a time.

    All rows' keys come first, then all values, then all slots, so that another count gives other values.
    Takes 0.2 ms a row. Source: zoology at its tag iclr24.
    """
    stream = np.random.RandomState(seed)
    probabilities = slot_probabilities(seqlen, pairs)
    kinds = (
        (np.arange(1, vocab // 2), None),
        (np.arange(vocab // 2, vocab), None),
        (len(probabilities), probabilities),
    )
    keys, values, slots = (
        torch.from_numpy(
            np.stack([stream.choice(of, size=pairs, replace=False, p=p) for _ in range(count)]).astype(
                np.int32
            )
        )
        for of, p in kinds
    )
    return _lay_out(keys, values, slots, seqlen)


def _lay_out(keys: Tensor, values: Tensor, slots: Tensor, seqlen: int) -> Examples:
    """key_0 value_0 key_1 value_1 ..., then the query of pair j at 2K + 2 slot_j and 0 between."""
    count, pairs = keys.shape
    tokens = torch.zeros(count, seqlen, dtype=torch.int32)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    queries = 2 * pairs + 2 * slots
    tokens.scatter_(1, queries.long(), keys)
    return Examples(tokens, queries, values)
