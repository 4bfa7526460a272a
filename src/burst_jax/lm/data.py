"""The user's files as one stream of tokens, cut into windows: every byte is learnt once an epoch.

The stream is `SEPARATOR file SEPARATOR file ... SEPARATOR`. A byte is the token of its own value,
so any file can be read and none is changed; the separator is token 256, which no byte can be. The
model reads across separators: they tell it where a document begins, and attention is not cut.

Window w has inputs `stream[w T : (w + 1) T]` and labels one token further, so each byte and each
separator but the first is a label exactly once an epoch. The last window is filled up with weight
0. Nothing but the windows in use is held in memory.
"""

import bisect
import dataclasses
import fnmatch
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

SEPARATOR = 256
NUM_TOKENS = 257


class Batch(NamedTuple):
    """Windows in natural order, before they are placed on devices."""

    tokens: Int32[np.ndarray, "B T"]
    labels: Int32[np.ndarray, "B T"]
    weights: Float32[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A stream of tokens read from files on demand.

    Attributes:
        files: what is read, in the order of the stream.
        sizes: their sizes in bytes when the corpus was opened.
        left_out: files that were found and not taken, with the reason.
    """

    files: tuple[pathlib.Path, ...]
    sizes: tuple[int, ...]
    left_out: tuple[tuple[pathlib.Path, str], ...] = ()
    _starts: tuple[int, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts = 1 + np.cumsum([0, *(size + 1 for size in self.sizes)])
        object.__setattr__(self, "_starts", tuple(starts.tolist()))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    @property
    def num_tokens(self) -> int:
        """Length of the stream: bytes and separators."""
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        """Tokens [start, stop) of the stream.

        Raises:
            ValueError: a file has vanished or shrunk since the corpus was opened.
        """
        stop = min(stop, self.num_tokens)
        tokens = np.full(stop - start, SEPARATOR, np.int32)
        first = max(bisect.bisect_right(self._starts, start) - 1, 0)
        for i in range(first, len(self.files)):
            at = self._starts[i]
            if at >= stop:
                break
            low, high = max(start, at), min(stop, at + self.sizes[i])
            if low < high:
                tokens[low - start : high - start] = _bytes_of(self.files[i], low - at, high - low)
        return tokens


def open_corpus(paths: Sequence[str | os.PathLike], include: Sequence[str] = ("*",)) -> Corpus:
    """The files at `paths`, folders with all below them, in the order given and then by name.

    Symbolic links to files are followed, links to folders inside a folder are not (they may be
    endless). A file reached twice is read once.

    Args:
        paths: files and folders.
        include: patterns, of which a file found in a folder must match one with its name. A file
            that is itself in `paths` is always taken.

    Raises:
        ValueError: no paths; a path that is missing or cannot be read; nothing but empty files.
    """
    if not paths:
        raise ValueError("no data: give at least one file or folder (--data PATH).")
    sizes: dict[pathlib.Path, int] = {}
    left_out: list[tuple[pathlib.Path, str]] = []
    for path, named in _walk(paths):
        if not named and not any(fnmatch.fnmatch(path.name, pattern) for pattern in include):
            left_out.append((path, "matches none of the patterns"))
        elif not named and not path.exists():
            left_out.append((path, "a link to nothing"))
        elif not path.is_file():
            if named:
                raise ValueError(f"data path {path} is neither a file nor a folder.")
            left_out.append((path, "not a regular file"))
        elif (size := _readable_size(path)) == 0:
            left_out.append((path, "empty"))
        else:
            sizes.setdefault(path.resolve(), size)
    if not sizes:
        what = ", ".join(map(str, paths))
        found = f"of {len(left_out)} files none can be used" if left_out else "no files are there"
        reasons = ", ".join(sorted({reason for _, reason in left_out}))
        raise ValueError(
            f"data path {what} is empty: {found}{reasons and f' ({reasons})'}; "
            f"give text to learn from."
        )
    return Corpus(tuple(sizes), tuple(sizes.values()), tuple(left_out))


def _walk(paths: Sequence[str | os.PathLike]) -> Iterator[tuple[pathlib.Path, bool]]:
    """Every file, and whether the caller named it himself."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"data path {error.filename} cannot be read: {error.strerror}.")

    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise ValueError(f"data path {path} does not exist.")
        if not path.is_dir():
            yield path, True
            continue
        for folder, subfolders, names in os.walk(path, onerror=refuse):
            subfolders.sort()
            for name in sorted(names):
                yield pathlib.Path(folder, name), False


def _readable_size(path: pathlib.Path) -> int:
    """Size in bytes of a file that can be opened."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"data path {path} cannot be read: {error.strerror}.") from error


def _bytes_of(path: pathlib.Path, offset: int, count: int) -> np.ndarray:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            read = np.frombuffer(file.read(count), np.uint8)
    except OSError as error:
        raise ValueError(f"data path {path} can no longer be read: {error.strerror}.") from error
    if len(read) != count:
        raise ValueError(
            f"data path {path} has become shorter since the run began; "
            f"train on files that do not change."
        )
    return read


@dataclasses.dataclass(frozen=True)
class Windows:
    """Some consecutive windows of a corpus, and an endless, reproducible order to learn them in.

    Attributes:
        corpus: the stream.
        seq_len: T, tokens in a window.
        first, last: the windows [first, last) of the stream.
    """

    corpus: Corpus
    seq_len: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def window(self, index: int) -> Batch:
        """Window `first + index`, as a batch of one."""
        start = (self.first + index) * self.seq_len
        read = self.corpus.read(start, start + self.seq_len + 1)
        real = len(read) - 1
        padded = np.full(self.seq_len + 1, SEPARATOR, np.int32)
        padded[: len(read)] = read
        weights = (np.arange(self.seq_len) < real).astype(np.float32)
        return Batch(padded[None, :-1], padded[None, 1:], weights[None])

    def batch(self, step: int, *, batch_size: int, seed: int) -> Batch:
        """The batch of a step, which depends on nothing but the arguments.

        Each epoch visits every window once, in an order of its own; epochs follow one another
        without a gap, so a batch may hold the end of one and the start of the next.
        """
        rows = []
        for n in range(step * batch_size, (step + 1) * batch_size):
            epoch, at = divmod(n, len(self))
            rows.append(self.window(int(_order(seed, epoch, len(self))[at])))
        return Batch(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


@functools.lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def split(corpus: Corpus, *, seq_len: int, holdout: float = 0.0) -> tuple[Windows, Windows]:
    """Windows to learn from, and those held out: the last `holdout` of the stream, rounded up.

    Raises:
        ValueError: too little text to hold anything out.
    """
    count = -(-(corpus.num_tokens - 1) // seq_len)
    held = int(np.ceil(holdout * count))
    if held >= count:
        raise ValueError(
            f"holdout = {holdout} would keep {held} of {count} windows of {seq_len} bytes and "
            f"leave none to learn from; give more text, or a smaller seq_len."
        )
    return (
        Windows(corpus, seq_len, 0, count - held),
        Windows(corpus, seq_len, count - held, count),
    )
