"""Joining processes to one run, and hearing of it when one of them ends before its time.

JAX itself notices a lost process after a minute or two, and then ends the others with a trace of its C++. So each
process also keeps a connection to the first: the system closes it when the process ends, however that happens, and
keep-alive messages find out where a whole host is gone.
"""

import contextlib
import os
import socket
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from ragjax.errors import UserError, reason

AUTO = "auto"

_CONNECT_SECONDS = 60.0
# Of the keep-alive messages: a host that is gone is noticed after about half a minute.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_BYE = b"."
_TEXT_BYTES = 256
_WORD_SECONDS, _LAST_SECONDS = 5.0, 10.0


def join_processes(coordinator: str, count: int | None, number: int | None) -> None:
    """Joins this process to the others of a run; before anything is computed.

    Args:
      coordinator: host:port at which the first process is found, or "auto": the cluster says that and the other two
        (Slurm, GKE, TPU VMs and whatever else JAX knows).
      count: of the processes.
      number: of this one, from 0.

    Raises:
      UserError: they do not come together, or the cluster does not say what is asked of it.
    """
    try:
        if coordinator == AUTO:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes=count, process_id=number)
    except Exception as error:  # of Python, of gRPC and of JAX, each in words of its own
        how = "" if coordinator != AUTO else ": give --coordinator_address, --num_processes and --process_id instead"
        raise UserError(f"the processes could not be joined ({reason(error)}){how}.") from error
    if jax.process_count() > 1:
        _watch.connect("" if coordinator == AUTO else coordinator.rsplit(":", 1)[0].strip("[]"))


def part() -> None:
    """Tells the others that this process will end, and that this is no loss: all have agreed, or its work is done."""
    for connection in _watch.connections:
        with contextlib.suppress(OSError):
            connection.sendall(_BYE)


def leave() -> None:
    """Ends the watch of a process that ends at once. The first waits a little for others that are about to end, too:
    JAX would end them by a trace when it is gone.
    """
    _watch.is_ending = True
    until = time.monotonic() + (_LAST_SECONDS if jax.process_index() == 0 else 0.0)
    for listener in _watch.listeners:
        listener.join(max(until - time.monotonic(), 0.0))


def wait_for_word() -> None:
    """Gives the watch time to end this process, where what went wrong may be that another one is gone."""
    if _watch.connections:
        time.sleep(_WORD_SECONDS)


class _Watch:
    """Connections between the first process and each of the others, and threads that listen to them."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self.listeners: list[threading.Thread] = []
        self.is_ending = False  # this process, so that nobody's end is a loss any more

    def connect(self, host: str) -> None:
        """host: where the first process is, if that is known."""
        if jax.process_index() == 0:
            with _server() as server:
                server.settimeout(_CONNECT_SECONDS)
                host = host or socket.gethostbyname(socket.gethostname())
                _from_first(f"{host}:{server.getsockname()[1]}")
                for _ in range(jax.process_count() - 1):
                    connection, _ = server.accept()
                    self._add(connection, connection.recv(4))
        else:
            host, port = _from_first("").rsplit(":", 1)
            connection = socket.create_connection((host, int(port)), _CONNECT_SECONDS)
            connection.sendall(jax.process_index().to_bytes(4, "little"))
            self._add(connection, bytes(4))

    def _add(self, connection: socket.socket, number: bytes) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener = threading.Thread(
            target=self._listen, args=(connection, int.from_bytes(number, "little")), daemon=True
        )
        self.connections.append(connection)
        self.listeners.append(listener)
        listener.start()

    def _listen(self, connection: socket.socket, number: int) -> None:
        """Ends this process where that of this number ends without a word."""
        said = b""
        with contextlib.suppress(OSError):
            while more := connection.recv(1):
                said += more
        if not (said or self.is_ending):
            sentence = (
                f"\nerror: process {number} of {jax.process_count()} has ended, and this one with it: see what that "
                "one said; the same commands on all hosts continue.\n"
            )
            os.write(2, sentence.encode())
            os._exit(1)


_watch = _Watch()


def _server() -> socket.socket:
    """On a free port of all addresses here."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _from_first(text: str) -> str:
    """The text that the first process gives."""
    padded = np.frombuffer(text.encode().ljust(_TEXT_BYTES, b"\0"), np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8)
    return told.tobytes().rstrip(b"\0").decode()
