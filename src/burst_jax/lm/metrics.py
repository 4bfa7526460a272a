"""A run's numbers as JSON lines: one object a line, each with the `event` it belongs to.

    {"event": "start", "time": ..., "config": {...}, "num_bytes": ..., ...}
    {"event": "step", "step": 1, "loss": 5.91, "tokens_per_s": ..., ...}
    {"event": "end", ...}

Runs append; a line "start" begins each. Every line is flushed, so the file can be followed while
the run lasts, and a run that is killed loses nothing it has shown.
"""

import datetime
import json
import pathlib
from types import TracebackType


class MetricsFile:
    """Appends events to `folder/metrics.jsonl`.

    Raises:
        ValueError: the folder or the file cannot be made or written.
    """

    def __init__(self, folder: str | pathlib.Path) -> None:
        self.path = pathlib.Path(folder) / "metrics.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"output folder {folder} cannot be written to: {error.strerror}."
            ) from error

    def write(self, event: str, values: dict[str, object]) -> None:
        """Appends one event. Values that are None are left out; NaN is refused, as JSON does."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"event": event, "time": now, **{k: v for k, v in values.items() if v is not None}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
