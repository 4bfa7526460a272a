"""Nothing of the user's files is lost, doubled or put in another order without a word."""

import collections
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burst_jax.lm.data import SEPARATOR, Corpus, open_corpus, split


@pytest.fixture
def folder(tmp_path):
    """A folder with files of every kind: all byte values, empty, nested, linked."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "b" / "inner.txt").write_bytes(b"inner")
    (tmp_path / "c.log").write_bytes(b"\r\n\x00\xff")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


def documents(corpus: Corpus) -> list[bytes]:
    """The stream cut at its separators."""
    stream = corpus.read(0, corpus.num_tokens)
    assert stream[0] == stream[-1] == SEPARATOR
    ends = np.flatnonzero(stream == SEPARATOR)
    return [bytes(stream[a + 1 : b].tolist()) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def test_every_byte_of_every_file_is_in_the_stream_in_order(folder):
    corpus = open_corpus([folder])
    assert documents(corpus) == [bytes(range(256)), b"\r\n\x00\xff", b"inner"]
    assert corpus.num_bytes == 256 + 4 + 5


def test_what_is_left_out_is_said_with_its_reason(folder):
    corpus = open_corpus([folder], include=("*.bin", "empty", "dangling"))
    assert documents(corpus) == [bytes(range(256))]
    reasons = {path.name: reason for path, reason in corpus.left_out}
    assert reasons == {
        "empty": "empty",
        "dangling": "a link to nothing",
        "c.log": "matches none of the patterns",
        "inner.txt": "matches none of the patterns",
    }


def test_a_file_that_is_named_is_taken_whatever_the_patterns_and_only_once(folder):
    paths = [folder / "c.log", folder / "a.bin", folder / "c.log"]
    corpus = open_corpus(paths, include=("*.txt",))
    assert documents(corpus) == [b"\r\n\x00\xff", bytes(range(256))]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "no data"),
        (["absent"], "absent does not exist"),
        (["b", "absent"], "absent does not exist"),
        (["empty"], "is empty"),
        (["nothing"], "is empty: no files are there"),
    ],
)
def test_data_that_is_missing_or_empty_is_refused(folder, monkeypatch, paths, message):
    (folder / "nothing").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        open_corpus(paths)


def test_data_that_cannot_be_read_is_refused(folder, monkeypatch):
    # Not by chmod: the superuser, as whom tests often run in containers, may read everything.
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.bin cannot be read: Permission denied"):
        open_corpus([folder])


def test_a_file_that_shrinks_during_a_run_is_refused(folder):
    corpus = open_corpus([folder / "a.bin"])
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="shorter since the run began"):
        corpus.read(0, 100)


@given(
    contents=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5),
    seq_len=st.integers(1, 50),
    data=st.data(),
)
def test_any_piece_of_the_stream_is_what_the_whole_has_there(
    tmp_path_factory, contents, seq_len, data
):
    folder = tmp_path_factory.mktemp("files")
    for i, content in enumerate(contents):
        (folder / f"{i}").write_bytes(content)
    corpus = open_corpus([folder])
    whole = corpus.read(0, corpus.num_tokens)
    start = data.draw(st.integers(0, corpus.num_tokens - 1))
    stop = data.draw(st.integers(start, corpus.num_tokens))
    np.testing.assert_array_equal(corpus.read(start, stop), whole[start:stop])

    # Each token but the first separator is a label exactly once, after the token before it.
    windows, held_out = split(corpus, seq_len=seq_len)
    assert len(held_out) == 0
    seen = []
    for index in range(len(windows)):
        tokens, labels, weights = (x[0] for x in windows.window(index))
        real = int(weights.sum())
        assert weights.tolist() == [1.0] * real + [0.0] * (seq_len - real)
        at = index * seq_len
        np.testing.assert_array_equal(tokens[:real], whole[at : at + real])
        seen += labels[:real].tolist()
    assert seen == whole[1:].tolist()


def test_an_epoch_visits_each_window_once_and_a_step_is_the_same_each_time(folder):
    windows, _ = split(open_corpus([folder / "a.bin"]), seq_len=16)
    count = len(windows)
    assert count == 17
    for batch_size in (1, 3):
        rows = []
        for step in range(2 * count // batch_size):
            batch = windows.batch(step, batch_size=batch_size, seed=7)
            assert batch.tokens.shape == (batch_size, 16)
            rows += [tuple(row) for row in batch.tokens.tolist()]
        for epoch in (rows[:count], rows[count : 2 * count]):
            assert max(collections.Counter(epoch).values()) == 1
        assert rows[:count] != rows[count : 2 * count]  # each epoch has an order of its own
    again = windows.batch(5, batch_size=3, seed=7)
    other = windows.batch(5, batch_size=3, seed=8)
    np.testing.assert_array_equal(again.tokens, windows.batch(5, batch_size=3, seed=7).tokens)
    assert (again.tokens != other.tokens).any()


def test_held_out_windows_are_the_last_and_are_not_learnt(folder):
    corpus = open_corpus([folder / "a.bin"])
    windows, held_out = split(corpus, seq_len=16, holdout=0.1)
    assert (len(windows), len(held_out)) == (15, 2)
    assert held_out.window(1).labels[0, 0] == SEPARATOR  # the stream's last token
    learnt = {int(t) for n in range(15) for t in windows.window(n).labels.flat}
    assert learnt.isdisjoint(held_out.window(0).labels.flat)
    with pytest.raises(ValueError, match="leave none to learn from"):
        split(corpus, seq_len=1000, holdout=0.1)
