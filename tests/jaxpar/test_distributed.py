"""Joining processes: what does not fit is one sentence, before JAX would end the program with a stack trace."""

import re
import socket
import threading
import warnings

import jax
import pytest
from processes import free_port, joined, start, together

from jaxpar import distributed, rollcall
from jaxpar.distributed import detect, initialise, is_main
from jaxpar.errors import UserError

V = "jaxpar 0.1.0, jax 0.10.2"
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("10.0.0.1:99", 2, 2), "process id 2 is outside 0 to 1: the process count is 2"),
        (("10.0.0.1:99", 2, -1), "process id -1 is outside 0 to 1"),
        (("10.0.0.1:99", 0, 0), "a process count of 0 is no run; give at least 1"),
        (("10.0.0.1:99", 2, None), "coordinator 10.0.0.1:99 needs a process id too, on each of the processes"),
        (("10.0.0.1:99", None, 0), "coordinator 10.0.0.1:99 needs a process count too"),
        ((None, 4, None), "a process count (4) needs a coordinator: give host:port of process 0"),
        ((None, None, 3), "a process id (3) needs a coordinator: give host:port of process 0"),
        (("10.0.0.1", 2, 0), "coordinator '10.0.0.1' is not host:port, such as 10.0.0.1:8476"),
        (("10.0.0.1:http", 2, 0), "coordinator '10.0.0.1:http' is not host:port"),
        (("10.0.0.1:70000", 2, 0), "coordinator '10.0.0.1:70000' is not host:port"),
    ],
)
@pytest.mark.quick
def test_arguments_that_do_not_fit_together(arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        initialise(*arguments)


@pytest.mark.quick
def test_alone_nothing_happens(devices):
    assert initialise() is None
    assert initialise(None, 1, None) is None
    assert is_main()


@pytest.mark.quick
def test_too_late(devices):
    with pytest.raises(UserError, match=r"before the first use of JAX, but it has started with 8 cpu device\(s\)"):
        initialise("127.0.0.1:1234", 2, 0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, "slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # a batch script outside srun
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "4"}, "openmpi"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, "tpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "kubernetes"),
    ],
)
def test_clusters_are_known_by_their_environment(environment, expected, tmp_path):
    assert detect(environment, tmp_path) == expected


@pytest.mark.quick
def test_a_tpu_machine_says_nothing_in_its_environment(tmp_path, monkeypatch):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    assert detect({}, tmp_path) == "tpu"
    assert detect({"TPU_SKIP_MDS_QUERY": "1"}, tmp_path) is None
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert detect({}, tmp_path) is None


@pytest.fixture
def cluster(monkeypatch):
    """`initialise` with a made-up environment; JAX's own start is replaced and its arguments are kept."""
    calls = []

    def use(environment, error=None):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def start_jax(*arguments, **options):
            calls.append((arguments, options))
            if error:
                raise error

        monkeypatch.setattr(jax.distributed, "initialize", start_jax)
        monkeypatch.setattr(distributed, "_require_fresh", lambda jax: None)
        return calls

    return use


@pytest.mark.quick
@pytest.mark.parametrize(
    ("extra", "devices_here"),
    [
        ({}, None),  # JAX's own choice: one task a GPU
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, list(range(4))),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
    ],
)
def test_slurm_needs_no_arguments_and_one_task_a_node_gets_all_its_gpus(cluster, extra, devices_here):
    calls = cluster({**SLURM, **extra})
    assert initialise() == "slurm"
    assert calls == [((), {"local_device_ids": devices_here, "initialization_timeout": 300})]


@pytest.mark.quick
def test_a_cluster_that_cannot_be_joined(cluster, monkeypatch):
    cluster(SLURM, RuntimeError("no route"))
    with pytest.raises(UserError, match="the processes of this slurm job could not be joined: no route"):
        initialise()
    assert initialise(process_count=1) is None  # the way out


@pytest.mark.quick
def test_kubernetes_without_its_client(cluster, monkeypatch):
    cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[k8s\]'"):
        initialise()


@pytest.mark.quick
def test_a_tpu_without_a_pod_runs_alone_and_says_so(cluster):
    cluster({"MEGASCALE_NUM_SLICES": "2"}, ValueError("coordinator_address should be defined."))
    with pytest.warns(UserWarning, match="a TPU is here but no pod was found; this process runs alone"):
        assert initialise() is None


def roll(*callers, timeout_s=10.0):
    """Call the roll from one thread for each (count, process, versions): what each raised, or None."""
    port, results = free_port(), [None] * len(callers)

    def one(i, count, process, versions):
        try:
            rollcall.call("127.0.0.1", port, count, process, versions, timeout_s)
        except UserError as error:
            results[i] = str(error)

    threads = [threading.Thread(target=one, args=(i, *caller)) for i, caller in enumerate(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results, port


@pytest.mark.quick
def test_all_are_here_and_the_port_is_free_at_once():
    results, port = roll((3, 2, V), (3, 0, V), (3, 1, V))
    assert results == [None] * 3
    socket.create_server(("127.0.0.1", port), reuse_port=False).close()


@pytest.mark.quick
def test_one_process_needs_no_other():
    assert roll((1, 0, V))[0] == [None]


@pytest.mark.quick
def test_everyone_hears_who_is_missing():
    results, port = roll((4, 0, V), (4, 2, V), timeout_s=0.5)
    assert (
        results
        == [
            f"processes 1, 3 of 4 did not report to 127.0.0.1:{port} within 0.5 s; start every process, with the same "
            "coordinator and a process id of its own"
        ]
        * 2
    )


@pytest.mark.quick
def test_two_with_one_id():
    results, _ = roll((3, 0, V), (3, 1, V), (3, 1, V))
    expected = "two processes were started with the process id 1; give each its own, from 0 to 2"
    assert results == [expected] * 3


@pytest.mark.quick
def test_another_count_or_other_versions():
    results, _ = roll((2, 0, V), (3, 1, V))
    assert results == ["process 1 was started with a process count of 3, process 0 with 2"] * 2
    results, _ = roll((2, 0, V), (2, 1, "jaxpar 0.1.0, jax 0.12.0"))
    assert (
        results
        == [f"process 1 runs jaxpar 0.1.0, jax 0.12.0, process 0 runs {V}; install the same versions everywhere"] * 2
    )


@pytest.mark.quick
def test_nobody_answers():
    results, port = roll((2, 1, V), timeout_s=0.3)
    assert re.fullmatch(
        rf"process 1 could not reach the coordinator 127.0.0.1:{port} within 0.3 s \(Connection refused\); check the "
        "address, that process 0 runs there, and the firewall",
        results[0],
    )


@pytest.mark.quick
def test_somebody_else_has_the_port():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"process 0 cannot listen on port {port} of the coordinator"):
            rollcall.call("127.0.0.1", port, 2, 0, V, 1.0)


@pytest.mark.quick
def test_a_stranger_does_not_spoil_the_roll():
    """Port scans and health checks connect, say something or nothing, and go."""
    port, failed = free_port(), []

    def lead():
        try:
            rollcall.call("127.0.0.1", port, 2, 0, V, 10.0)
        except UserError as error:
            failed.append(str(error))

    thread = threading.Thread(target=lead)
    thread.start()
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"", b"jaxpar one two\n", b"\xff" * 2000):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                    stranger.sendall(said)
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.05)
    rollcall.call("127.0.0.1", port, 2, 1, V, 10.0)
    thread.join(10)
    assert failed == []


JOIN = (
    "import sys; from jaxpar.distributed import initialise; initialise(sys.argv[1], 2, int(sys.argv[2]), timeout_s=2)"
)


def test_a_real_process_that_waits_in_vain_raises_and_does_not_abort():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (process,) = together([["-c", JOIN, f"127.0.0.1:{free_port()}", "0"]], timeout_s=60)
    assert process.popen.returncode == 1, process.output  # an exception, not SIGABRT
    assert "UserError: process 1 of 2 did not report" in process.output


def test_the_helper_kills_what_does_not_end_and_shows_its_output(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import sys, time; print('begun', *sys.argv[1:]); time.sleep(600)")
    with pytest.raises(AssertionError, match=r"not done after [\d.]+ s, so far:\nbegun 127.0.0.1:\d+ 2 0"):
        joined(script, 2, timeout_s=3)
    process = start([script, "x"])
    process.wait_for("begun x", 30)
    process.kill()
    assert process.popen.returncode == -9
    with pytest.raises(AssertionError, match=r"'never' did not come \(exit code 0\):\nhello"):
        start(["-c", "print('hello')"]).wait_for("never", 30)
