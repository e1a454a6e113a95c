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
        end = np.minimum(begin + self.length + 1, self._end[piece])

        # Chunks: the parts of documents in these rows, row after row. A search for each of them, and none for each
        # token, is what makes this fast; the rest is counting on.
        starts = self.stream.starts
        first = np.searchsorted(starts, begin, side="right") - 1
        counts = np.searchsorted(starts, end - 1, side="right") - first
        row = np.repeat(np.arange(len(indices)), counts)
        part = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        document = first[row] + part
        # A document that began in an earlier row counts from this row's first token: that is what it can see.
        start = np.maximum(starts[document], begin[row])
        sizes = np.minimum(starts[document + 1], end[row]) - start

        # For each token: its place in the stream and in its chunk.
        spread = lambda values: np.repeat(values, sizes)
        within = np.arange(int(sizes.sum())) - spread(np.cumsum(sizes) - sizes)
        place = spread(start) + within
        shape = (len(indices), self.length + 1)
        filled = None if len(place) == shape[0] * shape[1] else spread(row * shape[1] + start - begin[row]) + within

        def grid(values: np.ndarray, empty: int | float) -> np.ndarray:
            if filled is None:  # no padding: all are in their places already
                return values.reshape(shape)
            found = np.full(shape, empty, values.dtype)
            found.reshape(-1)[filled] = values
            return found

        ids_BxN = grid(np.asarray(self.stream.tokens)[place].astype(np.int32), self.pad)
        positions_BxN = grid(within.astype(np.int32), 0)
        segments_BxN = grid(spread((part + 1).astype(np.int32)), 0)
        weights_BxN = grid(spread(self.stream.weights[document]), 0.0)
        together = (segments_BxN[:, :-1] == segments_BxN[:, 1:]) & (segments_BxN[:, 1:] > 0)
        return {
            "tokens": ids_BxN[:, :-1],
            "targets": ids_BxN[:, 1:],
            "weights": np.where(together, weights_BxN[:, 1:], np.float32(0)),
            "positions": positions_BxN[:, :-1],
            "segments": segments_BxN[:, :-1],
        }
