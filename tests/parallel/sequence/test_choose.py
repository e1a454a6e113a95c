"""The bytes by hand, and what the rule picks."""

import subprocess
import sys
from dataclasses import replace

import pytest

from jaxpar.parallel.sequence.choose import Links, Workload, bytes_per_link, choose, copies
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.sequence.links import NETWORK, links_of

pytestmark = pytest.mark.quick

MULTI_HEAD = Workload(length=8192, heads=32, kv_heads=32, head_size=128, devices=8)
GROUPED = replace(MULTI_HEAD, kv_heads=4)
SWITCH = Links(bandwidth=200e9, all_pairs=True)
TORUS = Links(bandwidth=45e9)


def test_bytes_by_hand():
    """1024 tokens a device; a query has 32·128·2 = 8 KiB, a key as much, or 1 KiB when grouped."""
    hop = 1024 * 8192
    assert bytes_per_link("ring", MULTI_HEAD).up == 7 * 2 * hop
    assert bytes_per_link("ring", MULTI_HEAD).down == 0
    both = bytes_per_link("ring_bidirectional", MULTI_HEAD)
    assert both.up == both.down == 7 * hop
    token = bytes_per_link("tokenring", MULTI_HEAD)
    assert (token.up, token.down) == (7 * hop, 7 * (hop + 1024 * 32 * 4))
    assert bytes_per_link("tokenring", GROUPED) == token
    assert bytes_per_link("ring", GROUPED).up == 7 * 2 * hop / 8
    ulysses = bytes_per_link("ulysses", MULTI_HEAD)
    assert ulysses.total == 7 / 8 * (4 * hop + 1024 * 32 * 4)
    # 4 key heads for 8 devices: each twice.
    assert bytes_per_link("ulysses", GROUPED).total == 7 / 8 * (2 * hop + 2 * hop / 4 + 1024 * 32 * 4)
    backward = bytes_per_link("ring", GROUPED, backward=True)
    assert backward.up == 7 * 2 * (hop / 8 + 2 * hop / 8)
    assert bytes_per_link("ulysses", GROUPED, backward=True) == bytes_per_link("ulysses", GROUPED)


def test_rsa_moves_what_a_ring_moves():
    assert bytes_per_link("rsa", GROUPED).total == bytes_per_link("ring", GROUPED).total


def test_tokenring_does_not_pay_with_grouped_queries():
    busiest = lambda kind, work: max(bytes_per_link(kind, work).up, bytes_per_link(kind, work).down)
    assert busiest("tokenring", MULTI_HEAD) < busiest("ring", MULTI_HEAD)
    assert busiest("tokenring", replace(MULTI_HEAD, kv_heads=16)) > busiest("ring", replace(MULTI_HEAD, kv_heads=16))
    for kv_heads in (1, 2, 4, 8, 16, 32):
        work = replace(MULTI_HEAD, kv_heads=kv_heads)
        assert busiest("ring_bidirectional", work) <= busiest("tokenring", work)
    assert "TokenRing does not pay with 32 query heads over 4 key heads" in choose(GROUPED, SWITCH).reason
    assert "does not pay" not in choose(MULTI_HEAD, SWITCH).reason


def test_ulysses_is_constant_and_rings_grow_at_a_fixed_share():
    sent = lambda kind, n: bytes_per_link(kind, replace(MULTI_HEAD, devices=n, length=1024 * n)).total
    assert sent("ring", 32) == pytest.approx(31 * sent("ring", 2))
    assert sent("ulysses", 32) < 2 * sent("ulysses", 2)


@pytest.mark.parametrize(
    ("work", "links", "kind"),
    [
        (MULTI_HEAD, SWITCH, "ulysses"),
        (replace(MULTI_HEAD, heads=12, kv_heads=12), SWITCH, "ring_bidirectional"),  # 12 heads, 8 devices
        (GROUPED, replace(TORUS, latency=0.0), "ring_bidirectional"),
        (replace(MULTI_HEAD, length=2**20), replace(SWITCH, flops=400e12), "ring"),  # wholly hidden: the simplest
        (replace(MULTI_HEAD, devices=1), SWITCH, "ring"),
    ],
)
def test_the_rule(work, links, kind):
    found = choose(work, links)
    assert found.kind == kind, found
    assert found.seconds[kind] == min(found.seconds.values())


def test_the_hybrid_where_hosts_are_fast():
    work = replace(MULTI_HEAD, heads=8, kv_heads=8, devices=16, length=16384)
    links = Links(bandwidth=25e9, inner=8, inner_bandwidth=400e9, all_pairs=True)
    found = choose(work, links)
    assert (found.kind, found.inner) == ("hybrid", 8)
    assert "Ulysses cannot share 8 heads among 16 devices" in found.reason


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "times"), [(8, 8, 8, 1), (8, 2, 8, 4), (12, 3, 2, 2), (12, 4, 6, 3), (8, 4, 2, 1)]
)
def test_copies_of_key_heads(heads, kv_heads, devices, times):
    """Devices get whole key heads, and the query heads of each."""
    assert copies(heads, kv_heads, devices) == times
    assert kv_heads * times % devices == 0
    assert heads % (kv_heads * times) == 0


def test_refusals():
    with pytest.raises(ValueError, match=r"no traffic for the kind 'tokenrings' .did you mean 'tokenring'"):
        bytes_per_link("tokenrings", GROUPED)
    with pytest.raises(ValueError, match=r"multiple of 8 query heads, got 12 .*: 6 devices, or a hybrid"):
        bytes_per_link("ulysses", replace(MULTI_HEAD, heads=12, kv_heads=12))
    with pytest.raises(ValueError, match=r"100 tokens .*nearest that works: 104"):
        replace(MULTI_HEAD, length=100)
    with pytest.raises(ValueError, match="8 query heads are no multiple of 3"):
        replace(MULTI_HEAD, heads=8, kv_heads=3)


def test_free_of_jax():
    code = "import sys; import jaxpar.parallel.sequence.choose; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_links_by_the_kind_of_device():
    assert links_of("TPU v5 lite", 4, 8).bandwidth == 45e9
    assert links_of("TPU v5p", 4, 8).bandwidth == 90e9
    assert not links_of("TPU v99", 4, 8).all_pairs
    one_host = links_of("NVIDIA H100 80GB HBM3", 8, 8)
    assert (one_host.bandwidth, one_host.all_pairs, one_host.inner) == (450e9, True, 1)
    two_hosts = links_of("NVIDIA H100 80GB HBM3", 4, 8)
    assert (two_hosts.bandwidth, two_hosts.inner, two_hosts.inner_bandwidth) == (NETWORK, 4, 450e9)
    assert links_of("cpu", 8, 8).all_pairs


def test_auto_becomes_what_the_rule_picks():
    """Few heads leave rings only; over two hosts heads are exchanged inside each; a named kind stays."""
    auto = SequenceConfig("auto", exchange=3)
    few = replace(MULTI_HEAD, heads=4, kv_heads=4)
    found, why = auto.settled(few, TORUS)
    assert found.attention == choose(few, TORUS).kind == "ring_bidirectional"
    assert "Ulysses cannot share 4 heads among 8 devices" in why
    hosts = links_of("NVIDIA H100 80GB HBM3", 4, 8, flops=1e15)
    long = replace(MULTI_HEAD, length=2**20)
    picked = choose(long, hosts)
    found, _ = auto.settled(long, hosts)
    assert (found.attention, found.exchange) == (picked.kind, picked.inner if picked.kind == "hybrid" else 3)
    assert picked.kind == min(picked.seconds, key=picked.seconds.get)
    assert SequenceConfig("rsa").settled(long, hosts) == (SequenceConfig("rsa"), "")
