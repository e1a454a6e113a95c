"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases. After a resume the files are those of one run.

A run that was killed has written metrics of steps beyond its last checkpoint; it does those steps again. Each writer is
therefore opened with the step that the run starts from, and drops what it holds beyond it.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxpar.errors import UserError


class Writer(Protocol):
    """What a place for metrics must do. Values are Python numbers; a step is the number of updates done."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, png: bytes) -> None: ...

    def flush(self) -> None:
        """Called before a checkpoint: what was written so far survives the process."""

    def close(self) -> None: ...


class JsonLines:
    """One line a call: `{"step": 10, "loss": 3.2}`. Survives `kill -9`: each line is handed to the kernel at once.

    Args:
      path: the file.
      start: the step that the run starts from: lines beyond it, and a line torn by a kill, are dropped. 0: a new run.
      again: names that will be written at `start` once more, so that what stands there of them is dropped.
    """

    def __init__(self, path: str | Path, *, start: int = 0, again: Sequence[str] = ()):
        self.path = Path(path)
        try:
            if self.path.exists():
                _truncate(self.path, start, again)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"metrics cannot be written to {self.path}: {error.strerror or error}") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN: null says that there was a value and that it is no number.
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        self._line({"step": step, **finite})

    def text(self, step: int, name: str, text: str) -> None:
        self._line({"step": step, name: text})

    def image(self, step: int, name: str, png: bytes) -> None:
        """Lines hold no pictures."""

    def _line(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"metrics cannot be written to {self.path}: {error.strerror or error}") from None

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: str | Path) -> list[dict]:
    """The records of a metrics file; a line torn by a kill is left out."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if (record := _record(line)) is not None:
                records.append(record)
    return records


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _truncate(path: Path, start: int, again: Sequence[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    dropped = False
    with open(path, encoding="utf-8", errors="replace") as old, open(temporary, "w", encoding="utf-8") as new:
        for line in old:
            record = _record(line)
            kept = record is not None and record["step"] <= start and start > 0
            if kept and not (record["step"] == start and any(name in record for name in again)):
                new.write(line)
            else:
                dropped = True
        new.flush()
        os.fsync(new.fileno())
    if dropped:
        os.replace(temporary, path)
    else:
        temporary.unlink()


class TensorBoard:
    """Event files for TensorBoard.

    Written with TensorBoard's own record writer and messages, one flush a call: its `EventFileWriter` holds events back
    for up to two minutes (lost by a kill), and imports TensorFlow where that is installed.

    Args:
      folder: the log folder; each start adds a file.
      start: the step that the run starts from; a mark in the file tells TensorBoard to forget later ones.
    """

    def __init__(self, folder: str | Path, *, start: int = 0):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._tensor, self._shape, self._types = tensor_pb2, tensor_shape_pb2, types_pb2
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(open(Path(folder) / name, "wb"))
        except OSError as error:
            raise UserError(f"TensorBoard files cannot be written to {folder}: {error.strerror or error}") from None
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        if start > 0:
            mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(event_pb2.Event(step=start + 1, session_log=mark))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        summary = [self._summary.Summary.Value(tag=name, simple_value=v) for name, v in numbers.items()]
        self._add(self._event.Event(step=step, summary=self._summary.Summary(value=summary)))

    def text(self, step: int, name: str, text: str) -> None:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        # TensorBoard renders Markdown; a block of code keeps the text as it is.
        body = "\n".join("    " + line for line in text.splitlines())
        tensor = self._tensor.TensorProto(
            dtype=self._types.DT_STRING,
            string_val=[body.encode()],
            tensor_shape=self._shape.TensorShapeProto(dim=[self._shape.TensorShapeProto.Dim(size=1)]),
        )
        value = self._summary.Summary.Value(
            tag=f"{name}/text_summary", metadata=self._summary.SummaryMetadata(plugin_data=plugin), tensor=tensor
        )
        self._add(self._event.Event(step=step, summary=self._summary.Summary(value=[value])))

    def image(self, step: int, name: str, png: bytes) -> None:
        picture = self._summary.Summary.Image(encoded_image_string=png, colorspace=4)
        value = self._summary.Summary.Value(tag=name, image=picture)
        self._add(self._event.Event(step=step, summary=self._summary.Summary(value=[value])))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases (https://wandb.ai); needs the extra `wandb`.

    Args:
      project: the project's name.
      folder: where wandb keeps its files.
      name: the run's name and its identity: the same name goes on with the same run.
      config: shown beside the run.
    """

    def __init__(self, project: str, folder: str | Path, *, name: str, config: dict):
        try:
            import wandb
        except ImportError:
            raise UserError("wandb is not installed; install it with: pip install 'jaxpar[wandb]'") from None
        self._run = wandb.init(project=project, dir=str(folder), id=name, name=name, config=config, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # wandb ignores steps that it has seen; what a resumed run repeats is bitwise the same.
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def image(self, step: int, name: str, png: bytes) -> None:
        import wandb
        from PIL import Image

        self._run.log({name: wandb.Image(Image.open(io.BytesIO(png)))}, step=step)

    def flush(self) -> None:
        """wandb sends in its own process."""

    def close(self) -> None:
        self._run.finish()


class Writers:
    """Several writers as one; none of them where there is nothing to write (processes other than the first)."""

    def __init__(self, writers: Iterable[Writer] = ()):
        self._writers = list(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        for writer in self._writers:
            writer.text(step, name, text)

    def image(self, step: int, name: str, png: bytes) -> None:
        for writer in self._writers:
            writer.image(step, name, png)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers = []
