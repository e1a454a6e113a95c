"""Networks as files: TOML with regions and a matrix between them, CSV as a list of links or as a matrix.

TOML, for networks whose links follow from where the machines stand (`topologies/` has examples):

    name = "two sites"
    regions = ["zurich", "iowa"]
    latency_ms = [[0.5, 51], [51, 0.5]]          # row: from, column: to; the diagonal: inside a region
    bandwidth_mbit = [[10000, 220], [220, 10000]]
    symmetric = true                             # optional; false allows a matrix that is not
    overhead_ms = 0                              # optional; added to every message
    [[nodes]]
    region = "zurich"
    count = 3                                    # zurich-0, zurich-1, zurich-2; or name = "alone"
    speed = 1.0                                  # optional, as memory is
    memory = 3

CSV as a list; `link` is for both directions, `oneway` for one:

    node,a,zurich,1.0,3
    link,a,b,51,220                              # latency in ms, bandwidth in Mbit/s

CSV as a matrix; a cell is latency/bandwidth:

    latency_ms/bandwidth_mbit,speed,memory,a,b
    a,1.0,3,,51/220
    b,1.0,3,51/220,

Mbit/s are 10⁶ bits a second. Every error names the file, the rule, the numbers, and what to do.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from jaxpar.parallel.planner.network import Network, Node, check_link

MBIT = 1e6 / 8
"""Bytes a second of 1 Mbit/s."""

TOP = ("name", "regions", "latency_ms", "bandwidth_mbit", "symmetric", "overhead_ms", "nodes")
NODE = ("region", "count", "name", "speed", "memory")
CORNER = "latency_ms/bandwidth_mbit"


def shipped() -> dict[str, Path]:
    """The networks that come with the package, by name."""
    folder = resources.files("jaxpar.parallel.planner") / "topologies"
    return {Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".toml")}


def load(source: str | Path) -> Network:
    """A network by its name (`shipped`), or from a .toml or .csv file.

    Raises:
      FileNotFoundError: neither a name nor a file.
      ValueError: a file that is no network.
    """
    known = shipped()
    if str(source) in known:
        source = known[str(source)]
    path = Path(source).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(str(source), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"{source}: there is no such network file; shipped are {', '.join(known)}{hint}")
    readers = {".toml": from_toml, ".csv": from_csv}
    if path.suffix not in readers:
        raise ValueError(f"{source}: a network is a .toml or a .csv file, not {path.suffix or 'without an ending'!r}")
    try:
        text = path.read_text()
        return readers[path.suffix](text, path.stem)
    except UnicodeDecodeError:
        raise ValueError(f"{source}: the file is not text in UTF-8; write a network as TOML or CSV") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def from_toml(text: str, name: str = "network") -> Network:
    """The network in a TOML text. Raises ValueError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"this is no TOML: {error}") from error
    _known(data, TOP, "")
    for key in ("regions", "latency_ms", "bandwidth_mbit", "nodes"):
        if key not in data:
            raise ValueError(f"{key!r} is missing; a network has regions, latency_ms, bandwidth_mbit and [[nodes]]")
    regions = data["regions"]
    if not isinstance(regions, list) or not all(isinstance(r, str) for r in regions):
        raise ValueError(f"regions = {regions!r}; give a list of names")
    if len(set(regions)) < len(regions):
        twice = next(r for k, r in enumerate(regions) if r in regions[:k])
        raise ValueError(f"region {twice!r} is listed twice; list each once")
    symmetric = data.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ValueError(f"symmetric = {symmetric!r}; it is true or false")
    overhead = _number(data.get("overhead_ms", 0.0), "overhead_ms") / 1e3
    if overhead < 0:
        raise ValueError(f"overhead_ms = {overhead * 1e3:g}; give a number of at least 0")
    latency = _matrix(data["latency_ms"], "latency_ms", regions, symmetric)
    bandwidth = _matrix(data["bandwidth_mbit"], "bandwidth_mbit", regions, symmetric)
    for i, a in enumerate(regions):
        for j, b in enumerate(regions):
            what = f"the link inside region {a!r}" if i == j else f"the link from region {a!r} to {b!r}"
            check_link(what, latency[i][j] / 1e3, bandwidth[i][j] * MBIT)
    nodes, places = _nodes(data["nodes"], regions)
    return Network(
        str(data.get("name", name)),
        tuple(nodes),
        tuple(tuple(latency[a][b] / 1e3 + overhead for b in places) for a in places),
        tuple(tuple(bandwidth[a][b] * MBIT for b in places) for a in places),
    )


def _nodes(entries: Any, regions: list[str]) -> tuple[list[Node], list[int]]:
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError("nodes must be a list of tables; start each with [[nodes]]")
    nodes, places = [], []
    taken: dict[str, int] = {}
    for k, entry in enumerate(entries):
        _known(entry, NODE, f"[[nodes]] number {k + 1}: ")
        region = entry.get("region")
        if region not in regions:
            near = difflib.get_close_matches(str(region), regions, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"[[nodes]] number {k + 1} stands in region {region!r}, which regions does not list{hint}; it lists "
                f"{', '.join(regions)}"
            )
        count = entry.get("count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"[[nodes]] number {k + 1} has count = {count!r}; give a whole number of at least 1")
        if "name" in entry and count > 1:
            raise ValueError(f"[[nodes]] number {k + 1} has a name and count = {count}; leave one of them out")
        speed = _number(entry.get("speed", 1.0), f"the speed of [[nodes]] number {k + 1}")
        for _ in range(count):
            number = taken.get(region, 0)
            taken[region] = number + 1
            nodes.append(Node(str(entry.get("name", f"{region}-{number}")), region, speed, entry.get("memory", 3)))
            places.append(regions.index(region))
    return nodes, places


def _matrix(rows: Any, key: str, names: list[str], symmetric: bool) -> list[list[float]]:
    n = len(names)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{key} is no matrix; give {n} rows of {n} numbers, one for each region")
    if len(rows) != n:
        raise ValueError(f"{key} has {len(rows)} rows for {n} regions; give {n}, in the order of regions")
    for name, row in zip(names, rows, strict=True):
        if len(row) != n:
            raise ValueError(
                f"a link is missing: {key} has {len(row)} numbers in the row of {name!r}, for {n} regions; give {n}"
            )
    matrix = [
        [_number(v, f"{key} from {a!r} to {b!r}") for b, v in zip(names, row, strict=True)]
        for a, row in zip(names, rows, strict=True)
    ]
    if symmetric:
        for i in range(n):
            for j in range(i):
                if matrix[i][j] != matrix[j][i]:
                    raise ValueError(
                        f"{key} is {matrix[i][j]:g} from {names[i]!r} to {names[j]!r} and {matrix[j][i]:g} back; make "
                        "them equal, or set symmetric = false"
                    )
    return matrix


def _known(table: dict, keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; keys are {', '.join(keys)}"
            raise ValueError(f"{where}unknown key {key!r}{hint}")


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is {value!r}, which is no number") from None
    if math.isnan(number):
        raise ValueError(f"{what} is NaN; give the number that was measured")
    return number


def from_csv(text: str, name: str = "network") -> Network:
    """The network in a CSV text, a list or a matrix. Raises ValueError."""
    try:
        rows = [[cell.split("#")[0].strip() for cell in row] for row in csv.reader(io.StringIO(text))]
    except csv.Error as error:
        raise ValueError(f"this is no CSV: {error}") from error
    numbered = [(k, row) for k, row in enumerate(rows, 1) if any(row)]
    if not numbered:
        raise ValueError("the file is empty; start with a line such as node,NAME,REGION,SPEED,MEMORY")
    return (_csv_matrix if numbered[0][1][0] == CORNER else _csv_list)(numbered, name)


def _csv_list(rows: list[tuple[int, list[str]]], name: str) -> Network:
    nodes: dict[str, Node] = {}
    links: dict[tuple[str, str], tuple[float, float, int]] = {}
    for line, row in rows:
        kind, cells = row[0], [c for c in row[1:]]
        if kind == "node":
            if not 1 <= len(cells) <= 4:
                raise ValueError(f"line {line}: a node is node,NAME,REGION,SPEED,MEMORY, not {','.join(row)!r}")
            cells += [""] * (4 - len(cells))
            if cells[0] in nodes:
                raise ValueError(f"line {line}: there is a second node named {cells[0]!r}; give each its own name")
            nodes[cells[0]] = _csv_node(line, *cells)
    for line, row in rows:
        kind, cells = row[0], [c for c in row[1:]]
        if kind == "node":
            continue
        if kind not in ("link", "oneway") or len(cells) != 4:
            raise ValueError(
                f"line {line}: {','.join(row)!r} is no node,NAME,REGION,SPEED,MEMORY and no "
                "link,FROM,TO,LATENCY_MS,BANDWIDTH_MBIT (or oneway,...)"
            )
        a, b = cells[:2]
        for end in (a, b):
            if end not in nodes:
                near = difflib.get_close_matches(end, nodes, n=1, cutoff=0.5)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"line {line}: there is no node {end!r}{hint}; add a line node,{end},...")
        if a == b:
            raise ValueError(f"line {line}: a link from {a!r} to itself; leave it out")
        latency = _number(cells[2], f"line {line}: the latency") / 1e3
        bandwidth = _number(cells[3], f"line {line}: the bandwidth") * MBIT
        check_link(f"line {line}: the link from {a!r} to {b!r}", latency, bandwidth)
        for pair in [(a, b), (b, a)] if kind == "link" else [(a, b)]:
            if pair in links:
                raise ValueError(
                    f"line {line}: the link from {pair[0]!r} to {pair[1]!r} stands in line {links[pair][2]} already; "
                    "keep one, or give each direction its own line oneway,..."
                )
            links[pair] = (latency, bandwidth, line)
    return _from_links(name, nodes, links)


def _csv_matrix(rows: list[tuple[int, list[str]]], name: str) -> Network:
    head = rows[0][1]
    if head[1:3] != ["speed", "memory"]:
        raise ValueError(f"line {rows[0][0]}: a matrix starts with {CORNER},speed,memory, then the names of the nodes")
    names = head[3:]
    if len(set(names)) < len(names):
        twice = next(n for k, n in enumerate(names) if n in names[:k])
        raise ValueError(f"line {rows[0][0]}: there is a second node named {twice!r}; give each its own name")
    nodes: dict[str, Node] = {}
    links: dict[tuple[str, str], tuple[float, float, int]] = {}
    for line, row in rows[1:]:
        if row[0] not in names:
            raise ValueError(f"line {line}: the row of {row[0]!r} has no column; columns are {', '.join(names)}")
        if row[0] in nodes:
            raise ValueError(f"line {line}: there is a second row of {row[0]!r}; leave one out")
        if len(row) != len(head):
            raise ValueError(f"line {line}: {len(row)} cells for {len(head)} columns; give {len(head)}")
        nodes[row[0]] = _csv_node(line, row[0], "", row[1], row[2])
        for other, cell in zip(names, row[3:], strict=True):
            if other == row[0] or not cell:
                continue
            parts = cell.split("/")
            if len(parts) != 2:
                raise ValueError(f"line {line}: {cell!r} is no latency/bandwidth, for instance 51/220")
            latency = _number(parts[0], f"line {line}: the latency to {other!r}") / 1e3
            bandwidth = _number(parts[1], f"line {line}: the bandwidth to {other!r}") * MBIT
            check_link(f"line {line}: the link from {row[0]!r} to {other!r}", latency, bandwidth)
            links[row[0], other] = (latency, bandwidth, line)
    if missing := [n for n in names if n not in nodes]:
        raise ValueError(f"the row of {missing[0]!r} is missing; give a row for each of {len(names)} columns")
    return _from_links(name, {n: nodes[n] for n in names}, links)


def _csv_node(line: int, name: str, region: str, speed: str, memory: str) -> Node:
    try:
        number = int(memory) if memory else 3
    except ValueError:
        raise ValueError(f"line {line}: memory is {memory!r}, which is no whole number of microbatches") from None
    try:
        return Node(name, region, _number(speed or 1.0, f"line {line}: the speed of {name!r}"), number)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("line") else f"line {line}: {text}") from None


def _from_links(name: str, nodes: dict[str, Node], links: dict[tuple[str, str], tuple[float, float, int]]) -> Network:
    for a in nodes:
        for b in nodes:
            if a != b and (a, b) not in links:
                raise ValueError(
                    f"the link from {a!r} to {b!r} is missing; give its latency and bandwidth ({len(nodes)} nodes have "
                    f"{len(nodes) * (len(nodes) - 1)} directed links, {len(links)} are given)"
                )
    value = lambda a, b, k, own: own if a == b else links[a, b][k]
    return Network(
        name,
        tuple(nodes.values()),
        tuple(tuple(value(a, b, 0, 0.0) for b in nodes) for a in nodes),
        tuple(tuple(value(a, b, 1, math.inf) for b in nodes) for a in nodes),
    )


def to_csv(network: Network, file: str | Path | None = None, *, matrix: bool = False) -> str:
    """The network as CSV text, also into `file`. A matrix leaves the regions out. Numbers read back as they were, up to
    the rounding of their units."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    names = [node.name for node in network.nodes]
    ms = lambda i, j: repr(network.latency[i][j] * 1e3)
    mbit = lambda i, j: repr(network.bandwidth[i][j] / MBIT)
    if matrix:
        write([CORNER, "speed", "memory", *names])
        for i, node in enumerate(network.nodes):
            cells = ["" if i == j else f"{ms(i, j)}/{mbit(i, j)}" for j in range(network.size)]
            write([node.name, repr(node.speed), node.memory, *cells])
    else:
        for node in network.nodes:
            write(["node", node.name, node.region, repr(node.speed), node.memory])
        for i in range(network.size):
            for j in range(network.size):
                both = (ms(i, j), mbit(i, j)) == (ms(j, i), mbit(j, i))
                if i < j and both:
                    write(["link", names[i], names[j], ms(i, j), mbit(i, j)])
                elif i != j and not both:
                    write(["oneway", names[i], names[j], ms(i, j), mbit(i, j)])
    if file is not None:
        Path(file).write_text(out.getvalue())
    return out.getvalue()
