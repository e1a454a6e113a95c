"""Examples from a stream of documents: rows of tokens, targets, weights, positions and segments.

"stream": rows are cut from the stream one after the other, so that a row may hold several documents and parts of long
ones. "document": each row holds one document or a part of a longer one, and is padded. In both, the last token of a row
is the first of the next, so that every token but a document's first is a target once.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from jaxpar.data.cache import Stream
from jaxpar.errors import UserError


class Examples:
    """The examples of one split, by index. A pure function of the stream: nothing is drawn here.

    Args:
      stream: the split.
      length: tokens in a row T.
      packing: see the module's text.
      pad: the id of padding tokens.
      what: names the split in messages.

    Raises:
      UserError: the split has too few tokens for a single row.
    """

    def __init__(self, stream: Stream, length: int, packing: Literal["stream", "document"], pad: int, what: str):
        self.stream, self.length, self.pad = stream, length, pad
        total = int(stream.starts[-1])
        if packing == "stream":
            # The last token has no target.
            self._first_row = np.array([0, max(0, -(-(total - 1) // length))], np.int64)
            self._begin = np.zeros(1, np.int64)
            self._end = np.array([total], np.int64)
        else:
            targets = np.diff(stream.starts) - 1
            rows = -(-targets // length)
            self._first_row = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
            self._begin, self._end = stream.starts[:-1], stream.starts[1:]
        if len(self) == 0 or (packing == "stream" and total <= length):
            raise UserError(
                f"{what} has {total:,} tokens in {len(stream.weights)} documents, too few for one row of {length} tokens "
                "and a target; give more text, shorter rows (--data.length), or another --data.validation-fraction"
            )

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these indices: each field [rows, T], see `jaxpar.step.Batch`."""
        indices = np.asarray(indices, np.int64)
        piece = np.searchsorted(self._first_row, indices, side="right") - 1
        begin = self._begin[piece] + (indices - self._first_row[piece]) * self.length
        at_BxN = begin[:, None] + np.arange(self.length + 1)[None]
        real_BxN = at_BxN < self._end[piece][:, None]
        at_BxN = np.minimum(at_BxN, len(self.stream.tokens) - 1)
        ids_BxN = np.where(real_BxN, self.stream.tokens[at_BxN], self.pad).astype(np.int32)

        starts = self.stream.starts
        document_BxN = np.searchsorted(starts, at_BxN, side="right") - 1
        token, target = (document_BxN[:, :-1], document_BxN[:, 1:])
        both = real_BxN[:, :-1] & real_BxN[:, 1:]
        weights = np.where(both & (token == target), self.stream.weights[token], 0.0)
        # A document that began in an earlier row counts from this row's first token: that is what it can see.
        positions = at_BxN[:, :-1] - np.maximum(starts[token], begin[:, None])
        real = real_BxN[:, :-1]
        return {
            "tokens": ids_BxN[:, :-1],
            "targets": ids_BxN[:, 1:],
            "weights": weights.astype(np.float32),
            "positions": np.where(real, positions, 0).astype(np.int32),
            "segments": np.where(real, token - token[:, :1] + 1, 0).astype(np.int32),
        }
