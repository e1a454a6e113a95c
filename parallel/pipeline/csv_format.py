"""An order as a CSV file: a line a device, a cell a task, in the format of torch.distributed.pipelining.

A cell is stage, kind, microbatch: `3F0`, `3B0`, `3I0` (the input's gradient), `3W0` (the weights'). Empty cells are
ignored: the order counts, not the column. A device's stages are its chunks, lowest first. What cannot be told from the
cells stands in lines that start with `#`, which are written only where they are needed:

    # stages,0 3,1 2        the stages of each device, where some stage runs nothing
    # path,1,1 0 2 3        microbatch 1 visits its stages in this order, where it does not ascend

Where only the paths count, a file may hold nothing else: a line a microbatch, its stages in the order in which they run
(`0,2,1,3`). `paths_from_csv` reads both.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from jaxpar.parallel.pipeline.tasks import Kind, Order, Placement, Task, check_paths
from jaxpar.parallel.pipeline.tasks import Path as StagePath
from jaxpar.parallel.pipeline.validate import validate_order

LETTER = {Kind.F: "F", Kind.B: "B", Kind.BI: "I", Kind.BW: "W"}
KIND = {letter: kind for kind, letter in LETTER.items()} | {"Bi": Kind.BI, "Bw": Kind.BW}
CELL = re.compile(r"(\d+)(F|Bi|Bw|B|I|W)(\d+)")


def to_csv(order: Order, file: str | Path | None = None) -> str:
    """The order as text, written to `file` as well where one is given."""
    rows: list[list[str]] = []
    if _placement(order.tasks) != order.placement:
        rows.append(["# stages", *(_numbers(row) for row in order.placement.grid)])
    for m, path in enumerate(order.paths):
        if path != tuple(sorted(path)):
            rows.append(["# path", str(m), _numbers(path)])
    rows += [[f"{t.stage}{LETTER[t.kind]}{t.microbatch}" for t in row] for row in order.tasks]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    if file is not None:
        Path(file).write_text(text.getvalue())
    return text.getvalue()


def from_csv(source: str | Path, name: str | None = None) -> Order:
    """The order in a file, or in a text that has line breaks.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a cell that is no task, devices with different numbers of chunks, a task that is missing or stands
        twice, or a cycle, which could not run.
    """
    if isinstance(source, str) and "\n" in source:
        text, name = source, name or "csv"
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source}: there is no such file of tasks")
        text, name = _text(source), name or Path(source).stem
    tasks: list[tuple[Task, ...]] = []
    grid, orders = None, {}
    for number, row in enumerate(_rows(text), 1):
        cells = [cell.strip() for cell in row]
        if cells and cells[0] == "# stages":
            grid = tuple(_parse(cell, number) for cell in cells[1:])
        elif cells and cells[0] == "# path":
            if len(cells) != 3 or not cells[1].isdigit():
                raise ValueError(
                    f"line {number}: a path is '# path,MICROBATCH,STAGE STAGE ...', not {','.join(cells)!r}"
                )
            orders[int(cells[1])] = _parse(cells[2], number)
        elif not (cells and cells[0].startswith("#")):
            tasks.append(tuple(_task(cell, number) for cell in cells if cell))
    while tasks and not tasks[-1] and (grid is None or len(tasks) > len(grid)):  # blank lines at the end
        tasks.pop()
    if not any(tasks):
        raise ValueError(f"{name} holds no task; a line a device, cells such as 0F0 (stage, F, B, I or W, microbatch)")
    placement = Placement(grid) if grid is not None else _placement(tasks)
    if placement is None:
        counts = ", ".join(str(len({t.stage for t in row})) for row in tasks)
        raise ValueError(
            f"devices run {counts} stages; give every device as many chunks, stages 0 to n-1 each on one device, or a "
            "line '# stages,...' that lists each device's"
        )
    if placement.devices != len(tasks):
        raise ValueError(f"'# stages' lists {placement.devices} devices, and there are {len(tasks)} lines of tasks")
    order = Order(name, tuple(tasks), placement, _paths(tasks, orders, placement))
    validate_order(order)
    return order


def paths_from_csv(file: str | Path) -> tuple[StagePath, ...]:
    """The stages that each microbatch visits, in order, from a file of paths or of tasks.

    In a file of paths, empty lines and lines that start with `#` are ignored, and so is what follows a `#`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file that holds no path or is no text; a cell that is empty or no stage, or a stage that a path visits
        twice, with the line; in a file of tasks whatever `from_csv` refuses.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: there is no such file of paths")
    text = _text(file)
    try:
        lines = [(k, line.split("#")[0].strip()) for k, line in enumerate(text.splitlines(), 1)]
        written = [(k, line) for k, line in lines if line]
        if any(CELL.fullmatch(cell.strip()) for _, line in written for cell in line.split(",")):
            return from_csv(file).paths
        if not written:
            raise ValueError(
                "there is no path; give a line for each microbatch, its stages in order, for instance 0,2,3"
            )
        return tuple(_path(line, number) for number, line in written)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _rows(text: str) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(f"the file is no CSV: {error}") from error


def _text(file: str | Path) -> str:
    try:
        return Path(file).read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: the file is not text in UTF-8; tasks and paths are written as CSV") from None


def _path(text: str, line: int) -> StagePath:
    path: list[int] = []
    for cell in map(str.strip, text.split(",")):
        if not cell:
            raise ValueError(
                f"line {line}: {text!r} has an empty cell; write the stages of a path one after another, 0,2,3"
            )
        if not (cell.isascii() and cell.isdigit()):
            raise ValueError(
                f"line {line}: {cell!r} is no stage; write whole numbers of at least 0, for instance 0,2,3"
            )
        if int(cell) in path:
            raise ValueError(f"line {line}: the path visits stage {int(cell)} twice ({text}); once is the most")
        path.append(int(cell))
    return tuple(path)


def _paths(tasks: Iterable[Iterable[Task]], orders: dict[int, tuple[int, ...]], placement: Placement):
    visited: dict[int, set[int]] = {}
    for row in tasks:
        for task in row:
            visited.setdefault(task.microbatch, set()).add(task.stage)
    count = max(visited) + 1
    if missing := sorted(set(range(count)) - set(visited)):
        raise ValueError(
            f"microbatch {missing[0]} has no task, and microbatch {count - 1} has; number them 0 to "
            f"{len(visited) - 1} without gaps"
        )
    for m in orders:
        if m not in visited:
            raise ValueError(f"'# path' names microbatch {m}; microbatches are 0 to {count - 1}")
    return check_paths([orders.get(m, tuple(sorted(visited[m]))) for m in range(count)], placement.stages)


def _placement(tasks: Iterable[Iterable[Task]]) -> Placement | None:
    """A device's stages, lowest first; None where that is no placement."""
    try:
        return Placement(tuple(tuple(sorted({t.stage for t in row})) for row in tasks))
    except ValueError:
        return None


def _task(cell: str, line: int) -> Task:
    match = CELL.fullmatch(cell)
    if match is None:
        raise ValueError(f"line {line}: {cell!r} is no task; write stage, F, B, I or W, microbatch, for instance 0F3")
    stage, kind, microbatch = match.groups()
    return Task(KIND[kind], int(stage), int(microbatch))


def _numbers(values: Iterable[int]) -> str:
    return " ".join(map(str, values))


def _parse(cell: str, line: int) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in cell.split())
    except ValueError:
        raise ValueError(f"line {line}: {cell!r} is not a list of stages; write for instance 0 1 2 3") from None
