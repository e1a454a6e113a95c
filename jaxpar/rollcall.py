"""A roll call before `jax.distributed` starts: are all processes here, once each, and of one mind?

JAX's own start ends the program (SIGABRT and a C++ stack trace) where a process does not come in time, and no exception
tells which one. So process 0 listens on the coordinator's port for a moment first, and the others report to it: one
line there, one line back. Then the port is given to JAX.
"""

from __future__ import annotations

import contextlib
import socket
import time

from jaxpar.errors import UserError


def call(host: str, port: int, count: int, process: int, versions: str, timeout_s: float) -> None:
    """Return once all `count` processes have reported at host:port, on each of them.

    Args:
      versions: what must be equal everywhere, in words: "jaxpar 0.1.0, jax 0.10.2".

    Raises:
      UserError: who is missing, who came twice, or who is different; on every process that can be told.
    """
    deadline = time.monotonic() + timeout_s
    if process == 0:
        _lead(host, port, count, versions, deadline, timeout_s)
    else:
        _report(host, port, count, process, versions, deadline, timeout_s)


def _lead(host, port, count, versions, deadline, timeout_s) -> None:
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(host, port))
        while len(here) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [i for i in range(1, count) if i not in here]
                problem = (
                    f"{_processes(missing)} of {count} did not report to {host}:{port} within {timeout_s:g} s; start "
                    "every process, with the same coordinator and a process id of its own"
                )
                break
            stack.enter_context(connection)
            problem = _welcome(connection, here, count, versions)
            if problem:
                break
        else:
            problem = ""
        for connection in here.values():
            with contextlib.suppress(OSError):
                connection.sendall((problem or "go").encode() + b"\n")
        if problem:
            raise UserError(problem)
        for connection in here.values():  # let the other side close first: our port is then free at once
            with contextlib.suppress(OSError):
                connection.settimeout(2)
                connection.recv(1)


def _welcome(connection: socket.socket, here: dict, count: int, versions: str) -> str:
    """Hear one process; what is wrong with it, or nothing. A stranger (a port scan) is no process and is left alone."""
    try:
        connection.settimeout(5)
        word, process, their_count, theirs = _line(connection).split(" ", 3)
        process, their_count = int(process), int(their_count)
    except (OSError, ValueError):
        return ""
    if word != "jaxpar":
        return ""
    if their_count != count:
        problem = f"process {process} was started with a process count of {their_count}, process 0 with {count}"
    elif process in here or process == 0:
        problem = f"two processes were started with the process id {process}; give each its own, from 0 to {count - 1}"
    elif theirs != versions:
        problem = f"process {process} runs {theirs}, process 0 runs {versions}; install the same versions everywhere"
    else:
        here[process] = connection
        return ""
    with contextlib.suppress(OSError):
        connection.sendall(problem.encode() + b"\n")
    return problem


def _report(host, port, count, process, versions, deadline, timeout_s) -> None:
    connection = None
    while connection is None:
        try:
            connection = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1))
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {process} could not reach the coordinator {host}:{port} within {timeout_s:g} s "
                    f"({error.strerror or error}); check the address, that process 0 runs there, and the firewall"
                ) from None
            time.sleep(0.1)
    with connection:
        try:
            connection.sendall(f"jaxpar {process} {count} {versions}\n".encode())
            connection.settimeout(max(deadline - time.monotonic(), 0.1) + 5)  # process 0 may have started later
            answer = _line(connection)
        except TimeoutError:
            answer = f"process {process} waited {timeout_s:g} s at {host}:{port}, but not all {count} processes came"
        except OSError as error:
            answer = f"process {process} lost the coordinator {host}:{port} ({error.strerror or error})"
    if answer != "go":
        raise UserError(answer or f"{host}:{port} answered process {process} with nothing; is process 0 there?")


def _listen(host: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} of the coordinator {host}:{port} ({error.strerror or error}); "
            "choose a free port"
        ) from None


def _line(connection: socket.socket) -> str:
    """One line, of at most 1000 bytes; what there is of it where the other side closes."""
    got = b""
    while not got.endswith(b"\n") and len(got) < 1000:
        part = connection.recv(1)
        if not part:
            break
        got += part
    return got.decode(errors="replace").rstrip("\n")


def _processes(ids: list[int]) -> str:
    return f"process {ids[0]}" if len(ids) == 1 else f"processes {', '.join(map(str, ids))}"
