"""Two real processes on this machine, joined by `jax.distributed` over 127.0.0.1 and Gloo."""

from pathlib import Path

from processes import joined

HERE = Path(__file__).parent


def test_two_processes_sum_over_one_mesh():
    processes = joined(HERE / "two_processes_program.py", 2, timeout_s=120, devices=2)
    for i, process in enumerate(processes):
        assert process.popen.returncode == 0, process.output
        # 8 rows over 4 devices: each process is asked for its own rows only, and both see the whole sum.
        assert f"process {i}: devices 2 of 4, rows {[4 * i, 4 * i + 2]}" in process.output
        assert f"process {i}: total {float(sum(range(24)))}" in process.output
