"""Networks: those that ship, TOML and CSV there and back, and what is wrong with a file."""

import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.parallel.planner.files import from_csv, from_toml, load, shipped, to_csv
from jaxpar.parallel.planner.network import Network, Node
from jaxpar.parallel.planner.problem import Problem, Rules, Workload
from tests.parallel.planner.brute_force import network

pytestmark = pytest.mark.quick

GOOD = """
name = "two sites"
regions = ["zurich", "iowa"]
latency_ms = [[0.5, 51], [51, 0.5]]
bandwidth_mbit = [[10000, 220], [220, 10000]]
[[nodes]]
region = "zurich"
count = 2
[[nodes]]
region = "iowa"
name = "alone"
speed = 0.5
memory = 2
"""
LIST = "node,a,zurich,1.0,3\nnode,b,iowa,2,4\nnode,c\nlink,a,b,51,220\nlink,a,c,1,100\nlink,b,c,2,100\n"
MATRIX = "latency_ms/bandwidth_mbit,speed,memory,a,b\na,1.0,3,,51/220\nb,0.5,2,51/100,\n"


@pytest.mark.parametrize(
    ("name", "nodes", "regions", "symmetric"),
    [
        ("cloud20", 20, 12, True),
        ("volunteers20", 20, 5, False),
        ("racks16", 16, 2, True),
        ("homogeneous12", 12, 1, True),
    ],
)
def test_those_that_ship(name, nodes, regions, symmetric):
    net = load(name)
    assert (net.name, net.size, net.symmetric) == (name, nodes, symmetric)
    assert len({node.region for node in net.nodes}) == regions
    n = range(net.size)
    for i in n:
        for j in n:
            if i != j:
                assert 0 < net.latency[i][j] < 1
                assert 1e6 < net.bandwidth[i][j] <= 12.5e9  # 8 Mbit/s to 100 Gbit/s
                # No detour is much faster in latency than the link itself: the numbers belong together.
                assert all(
                    net.latency[i][k] + net.latency[k][j] > 0.5 * net.latency[i][j] for k in n if k not in (i, j)
                )
    assert set(shipped()) == {"cloud20", "volunteers20", "racks16", "homogeneous12"}


def test_the_published_network():
    """Pairs of SkipPipe's DELAY_BANDWIDTHS: tokyo-iowa is 72.5 ms, and each message pays 350 ms besides."""
    net = load("cloud20")
    place = {node.region: i for i, node in enumerate(net.nodes)}
    assert net.latency[place["tokyo"]][place["iowa"]] == pytest.approx(0.4225)
    assert net.bandwidth[place["sydney"]][place["belgium"]] == pytest.approx(84.41e6 / 8)
    seconds = net.seconds(33_554_432.0)
    assert seconds[place["sydney"]][place["belgium"]] == pytest.approx(0.479 + 33_554_432 * 8 / 84.41e6)
    assert seconds[3][3] == 0
    assert Problem(net, Workload(), Rules(6, 4), 30).sizes == (5, 3, 3, 3, 3, 3)  # as in the published schedule


def test_a_toml(tmp_path):
    net = from_toml(GOOD)
    assert net.name == "two sites"
    assert net.nodes == (Node("zurich-0", "zurich"), Node("zurich-1", "zurich"), Node("alone", "iowa", 0.5, 2))
    assert net.latency[0][1:] == (0.0005, 0.051)
    assert net.bandwidth[1][2] == 220e6 / 8
    (tmp_path / "net.toml").write_text(GOOD)
    assert load(tmp_path / "net.toml") == load(str(tmp_path / "net.toml")) == net


def test_csv(tmp_path):
    net = from_csv(LIST, "three")
    assert net.nodes == (Node("a", "zurich", 1.0, 3), Node("b", "iowa", 2.0, 4), Node("c"))
    assert net.latency[1][0] == net.latency[0][1] == 0.051
    one_way = from_csv(LIST.replace("link,b,c,2,100", "oneway,b,c,2,100\noneway,c,b,4,50"))
    assert (one_way.latency[1][2], one_way.latency[2][1]) == (0.002, 0.004)
    assert not one_way.symmetric
    matrix = from_csv(MATRIX)
    assert (matrix.bandwidth[0][1], matrix.bandwidth[1][0]) == (220e6 / 8, 100e6 / 8)
    (tmp_path / "net.csv").write_text(MATRIX)
    assert load(tmp_path / "net.csv").nodes == matrix.nodes


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000), st.booleans())
def test_there_and_back(size, seed, matrix):
    net = network(size, seed, memory=(1, 4))
    back = from_csv(to_csv(net, matrix=matrix), net.name)
    assert back.nodes == net.nodes
    for mine, other in ((net.latency, back.latency), (net.bandwidth, back.bandwidth)):
        assert all(mine[i][j] == pytest.approx(other[i][j]) for i in range(size) for j in range(size) if i != j)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "[51, 0.5]]",
            "[51]]",
            "a link is missing: latency_ms has 1 numbers in the row of 'iowa', for 2 regions; give 2",
        ),
        ("[220, 10000]]", "[-220, 10000]]", "bandwidth_mbit is -220 from 'iowa' to 'zurich' and 220 back"),
        (
            "220",
            "-220",
            "the link from region 'zurich' to 'iowa' has a bandwidth of -220 Mbit/s; give a number above 0",
        ),
        ("220", "0", "the link from region 'zurich' to 'iowa' has a bandwidth of 0 Mbit/s; give a number above 0"),
        ("51", "-51", "the link from region 'zurich' to 'iowa' has a latency of -51 ms; give a number of at least 0"),
        ("0.5, 51", "nan, 51", "latency_ms from 'zurich' to 'zurich' is NaN; give the number that was measured"),
        ("0.5, 51", '"x", 51', "latency_ms from 'zurich' to 'zurich' is 'x', which is no number"),
        (", [51, 0.5]]", "]", "latency_ms has 1 rows for 2 regions; give 2, in the order of regions"),
        ("[[0.5, 51], [51, 0.5]]", "3", "latency_ms is no matrix; give 2 rows of 2 numbers, one for each region"),
        ("latency_ms =", "latency =", "unknown key 'latency'; did you mean 'latency_ms'?"),
        ("bandwidth_mbit = [[10000, 220], [220, 10000]]", "", "'bandwidth_mbit' is missing; a network has regions"),
        ('["zurich", "iowa"]', '["zurich", "zurich"]', "region 'zurich' is listed twice; list each once"),
        ('["zurich", "iowa"]', "7", "regions = 7; give a list of names"),
        (
            'region = "iowa"',
            'region = "iowe"',
            "[[nodes]] number 2 stands in region 'iowe', which regions does not list (did",
        ),
        ("count = 2", "count = 0", "[[nodes]] number 1 has count = 0; give a whole number of at least 1"),
        ("count = 2", 'count = 2\nname = "x"', "[[nodes]] number 1 has a name and count = 2; leave one of them out"),
        ('"alone"', '"zurich-0"', "two nodes named 'zurich-0'; give each node its own name"),
        ("speed = 0.5", "speed = 0", "node 'alone' has speed 0.0; a speed is a number above 0"),
        ("speed = 0.5", "sped = 0.5", "[[nodes]] number 2: unknown key 'sped'; did you mean 'speed'?"),
        (
            "memory = 2",
            "memory = 1.5",
            "node 'alone' has memory for 1.5 microbatches; give a whole number of at least 1",
        ),
        ("memory = 2", "memory = 0", "node 'alone' has memory for 0 microbatches"),
        ("[[0.5", "[[0.5,,", "this is no TOML"),
    ],
)
def test_what_is_wrong_with_a_toml(old, new, sentence, tmp_path):
    text = GOOD.replace(old, new)
    assert text != GOOD
    file = tmp_path / "net.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        load(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "old", "new", "sentence"),
    [
        (
            LIST,
            "link,b,c,2,100\n",
            "",
            "the link from 'b' to 'c' is missing; give its latency and bandwidth (3 nodes have 6",
        ),
        (LIST, "link,b,c", "oneway,b,c", "the link from 'c' to 'b' is missing"),
        (
            LIST,
            "2,100",
            "2,-100",
            "line 6: the link from 'b' to 'c' has a bandwidth of -100 Mbit/s; give a number above 0",
        ),
        (LIST, "51,220", "-51,220", "line 4: the link from 'a' to 'b' has a latency of -51 ms"),
        (LIST, "51,220", "51", "line 4: 'link,a,b,51' is no node,NAME,REGION,SPEED,MEMORY and no link,FROM,TO"),
        (LIST, "51,220", "x,220", "line 4: the latency is 'x', which is no number"),
        (LIST, "link,a,c", "link,a,d", "line 5: there is no node 'd'"),
        (LIST, "link,a,c", "link,a,a", "line 5: a link from 'a' to itself; leave it out"),
        (LIST, "link,a,c", "link,b,a", "line 5: the link from 'b' to 'a' stands in line 4 already"),
        (LIST, "node,c", "node,a", "line 3: there is a second node named 'a'; give each its own name"),
        (LIST, "node,c", "node,,x", "line 3: a node has no name"),
        (LIST, "iowa,2,4", "iowa,0,4", "line 2: node 'b' has speed 0.0; a speed is a number above 0"),
        (LIST, "iowa,2,4", "iowa,2,4.5", "line 2: memory is '4.5', which is no whole number of microbatches"),
        (LIST, LIST, "\n", "the file is empty; start with a line such as node,NAME,REGION,SPEED,MEMORY"),
        (LIST, LIST, "node,a\n", "has 1 node(s); a network has at least 2"),
        (MATRIX, "b,0.5,2,51/100,\n", "", "the row of 'b' is missing; give a row for each of 2 columns"),
        (MATRIX, "51/100", "", "the link from 'b' to 'a' is missing"),
        (MATRIX, "51/100", "51", "line 3: '51' is no latency/bandwidth, for instance 51/220"),
        (MATRIX, "51/100", "51/-3", "line 3: the link from 'b' to 'a' has a bandwidth of -3 Mbit/s"),
        (MATRIX, "b,0.5", "c,0.5", "line 3: the row of 'c' has no column; columns are a, b"),
        (MATRIX, "b,0.5", "a,0.5", "line 3: there is a second row of 'a'; leave one out"),
        (MATRIX, ",,51", ",51", "line 2: 4 cells for 5 columns; give 5"),
        (MATRIX, "memory,a,b", "memory,a,a", "line 1: there is a second node named 'a'"),
        (MATRIX, "speed,memory", "memory,speed", "line 1: a matrix starts with latency_ms/bandwidth_mbit,speed,memory"),
    ],
)
def test_what_is_wrong_with_a_csv(text, old, new, sentence, tmp_path):
    changed = text.replace(old, new, 1)
    assert changed != text
    file = tmp_path / "net.csv"
    file.write_text(changed)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        load(file)
    assert "\n" not in str(error.value)


def test_what_is_no_network(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cloud2: there is no such network file; .*did you mean cloud20\?"):
        load("cloud2")
    (tmp_path / "net.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a network is a \.toml or a \.csv file, not '\.json'"):
        load(tmp_path / "net.json")
    (tmp_path / "net.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="the file is not text in UTF-8; write a network as TOML or CSV"):
        load(tmp_path / "net.toml")
    with pytest.raises(ValueError, match=re.escape("give 2 rows of 2")):
        Network("odd", (Node("a"), Node("b")), ((0.0, 1.0),), ((1.0, 1.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match="the link from 'a' to 'b' has a latency of inf ms"):
        Network("odd", (Node("a"), Node("b")), ((0.0, math.inf),) * 2, ((1.0, 1.0),) * 2)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([GOOD, LIST, MATRIX]), st.integers(0, 2**32))
def test_a_torn_file_gets_one_sentence(text, seed):
    """Characters are cut out, doubled or exchanged: what comes is a network or one sentence."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        a, b = draw.choice([(a, min(b, a + 3)), (a, a), (a, len(text))])
        text = text[:a] + draw.choice(["", text[a:b] * 2, draw.choice('0-,."[]=\nx#\r\0/')]) + text[b:]
    said = ""
    try:
        (from_toml if "regions" in text else from_csv)(text)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert said == "" or len(said) > 15
