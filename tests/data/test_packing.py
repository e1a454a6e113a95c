"""Rows against a slow reference that walks through the documents token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.data.cache import Stream
from jaxpar.data.packing import Examples
from jaxpar.errors import UserError

PAD = 9999
FIELDS = ("tokens", "targets", "weights", "positions", "segments")


def stream_of(lengths, weights=None):
    """Documents of these lengths. Token i of the stream has id i, so that a token is told by its id."""
    total = sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = np.arange(1, len(lengths) + 1) if weights is None else weights
    return Stream(np.arange(total, dtype=np.uint32), starts, np.asarray(weights, np.float32))


def reference(stream, length, packing):
    """Rows as lists, built with loops and no arithmetic on indices."""
    documents = [
        [(int(token), number) for token in stream.tokens[a:b]]
        for number, (a, b) in enumerate(zip(stream.starts[:-1], stream.starts[1:], strict=True))
    ]
    pieces = [[token for document in documents for token in document]] if packing == "stream" else documents
    rows = []
    for piece in pieces:
        while len(piece) > 1:  # a single token has no target
            row = {name: [] for name in FIELDS}
            seen, position = [], 0
            for i in range(length):
                token, document = piece[i] if i < len(piece) else (PAD, None)
                target, following = piece[i + 1] if i + 1 < len(piece) else (PAD, None)
                if document is not None and document not in seen:
                    seen.append(document)
                    position = 0
                inside = document is not None and document == following
                row["tokens"].append(token)
                row["targets"].append(target)
                row["weights"].append(float(stream.weights[document]) if inside else 0.0)
                row["positions"].append(position if document is not None else 0)
                row["segments"].append(len(seen) if document is not None else 0)
                position += 1
            rows.append(row)
            piece = piece[length:]
    return {name: np.array([row[name] for row in rows]) for name in FIELDS}


documents = st.lists(st.integers(1, 12), min_size=1, max_size=12)
packings = st.sampled_from(["stream", "document"])


def make(lengths, length, packing):
    """The examples, or None where there are too few tokens; that this is told is tested apart."""
    try:
        return Examples(stream_of(lengths), length, packing, PAD, "the training split")
    except UserError:
        enough = sum(lengths) > length if packing == "stream" else max(lengths) > 1
        assert not enough
        return None


@pytest.mark.quick
@settings(deadline=None, max_examples=150)
@given(documents, st.integers(1, 9), packings)
def test_rows_equal_the_reference(lengths, length, packing):
    examples = make(lengths, length, packing)
    if examples is None:
        return
    expected = reference(examples.stream, length, packing)
    assert len(examples) == len(expected["tokens"])
    found = examples.rows(np.arange(len(examples)))
    for name in FIELDS:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert {name: found[name].dtype for name in FIELDS} == {
        name: np.dtype(np.float32 if name == "weights" else np.int32) for name in FIELDS
    }


@settings(deadline=None, max_examples=150)
@given(documents, st.integers(1, 9), packings)
def test_every_token_but_a_first_one_is_a_target_exactly_once(lengths, length, packing):
    examples = make(lengths, length, packing)
    if examples is None:
        return
    stream = examples.stream
    rows = examples.rows(np.arange(len(examples)))
    counted = rows["weights"] > 0
    targets = rows["targets"][counted]
    expected = np.setdiff1d(stream.tokens, stream.starts[:-1])
    np.testing.assert_array_equal(np.sort(targets), expected)
    # Each follows its own token, with its own document's weight.
    np.testing.assert_array_equal(rows["tokens"][counted] + 1, targets)
    document = np.searchsorted(stream.starts, targets, side="right") - 1
    np.testing.assert_array_equal(rows["weights"][counted], stream.weights[document])


@settings(deadline=None, max_examples=60)
@given(documents, st.integers(1, 9), packings, st.data())
def test_any_choice_and_order_of_rows(lengths, length, packing, data):
    examples = make(lengths, length, packing)
    if examples is None:
        return
    every = examples.rows(np.arange(len(examples)))
    indices = data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=6))
    found = examples.rows(np.array(indices, np.int64))
    for name in FIELDS:
        np.testing.assert_array_equal(found[name], every[name][np.array(indices, np.int64)], err_msg=name)


@settings(deadline=None, max_examples=60)
@given(documents, st.integers(1, 9), packings)
def test_padding_comes_last_and_counts_nothing(lengths, length, packing):
    examples = make(lengths, length, packing)
    if examples is None:
        return
    rows = examples.rows(np.arange(len(examples)))
    padding = rows["segments"] == 0
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert not padding[:, 0].any()
    np.testing.assert_array_equal(rows["tokens"] == PAD, padding)
    for name in ("weights", "positions"):
        assert (rows[name][padding] == 0).all()


def test_a_document_of_weight_zero_is_read_but_not_learned():
    rows = Examples(stream_of([4, 4], [0.0, 2.0]), 8, "document", PAD, "it").rows(np.arange(2))
    np.testing.assert_array_equal(rows["weights"].sum(1), [0.0, 6.0])
    np.testing.assert_array_equal((rows["segments"] > 0).sum(1), [4, 4])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("lengths", "packing", "count"),
    [
        ([], "stream", "0 tokens"),
        ([], "document", "0 tokens"),
        ([8], "stream", "8 tokens"),
        ([1, 1], "document", "2 t"),
    ],
)
def test_too_few_tokens(lengths, packing, count):
    with pytest.raises(UserError, match=rf"the validation split has {count}.*too few.*--data\.length"):
        Examples(stream_of(lengths), 8, packing, PAD, "the validation split")


def test_one_row_and_a_target_are_enough():
    assert len(Examples(stream_of([9]), 8, "stream", PAD, "it")) == 1
    assert len(Examples(stream_of([10]), 8, "stream", PAD, "it")) == 2
    assert len(Examples(stream_of([1, 2]), 8, "document", PAD, "it")) == 1
