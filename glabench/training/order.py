"""Which sequences a step trains on: a function of the seed and the step alone, so that resuming is exact."""

import numpy as np

from glabench.corpus.manifest import Tokens
from glabench.errors import UsageError


class Order:
    """Sequences of `length` tokens in shuffled order, epoch after epoch, each epoch shuffled anew.

    The tokens are cut into adjacent sequences; what is left at the end of the split is not used.
    Raises: UsageError where the split is shorter than one sequence.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = len(tokens) // length
        if not self.count:
            raise UsageError(
                f"{len(tokens):,} tokens are fewer than one sequence of {length:,}",
                where="--data",
                fix="prepare more text, or shorten the sequence",
            )
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def sequence(self, number: int) -> int:
        """The index within the split of the `number`-th sequence trained on, counted from 0."""
        epoch, inside = divmod(number, self.count)
        if epoch != self._epoch:
            # Philox is keyed: no stream has to be run up to this epoch
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(self.count)
        return int(self._permutation[inside])

    def rows(self, first: int, count: int) -> np.ndarray:
        """Sequences `first` to `first + count` of the training order, int64 `[count, length]`."""
        return np.stack(
            [
                self.tokens.read(self.sequence(number) * self.length, self.length)
                for number in range(first, first + count)
            ]
        )


def validation_rows(tokens: Tokens, length: int, limit: int) -> int:
    """How many sequences of the validation split are evaluated: `limit` tokens at most, one at least."""
    return min(len(tokens) // length, max(1, limit // length))
