"""Joining processes to one run, and hearing of it when one of them ends before its time.

JAX itself notices a lost process after a minute or two, and then ends the others with a trace of its C++. So each
process also keeps a connection to the first: the system closes it when the process ends, however that happens, and
keep-alive messages find out where a whole host is gone.
"""

import contextlib
import os
import secrets
import signal
import socket
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from ragjax.errors import UserError, reason
from ragjax.voice import warn

AUTO = "auto"

_FOUND_SECONDS, _CONNECT_SECONDS = 240.0, 60.0
# Of the keep-alive messages: a host that is gone is noticed after about half a minute.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# What a process says before it ends: that all will, or the exit code of the signal that ends it.
_BYE = b"."
_INTERRUPTED, _TERMINATED = 130, 143
_TEXT_BYTES, _TOKEN_BYTES = 256, 8
# Seconds that one which has met an error waits for the watch's word; that the watch gives a process to end by itself;
# that the first waits for the others.
_WORD_SECONDS, _OWN_SECONDS, _LAST_SECONDS = 6.0, 3.0, 10.0


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
    if coordinator != AUTO and number:
        _find(coordinator)
    try:
        if coordinator == AUTO:
            jax.distributed.initialize()
        else:  # JAX would still look for a cluster, and on Slurm hide all devices but one
            jax.distributed.initialize(
                coordinator, num_processes=count, process_id=number, cluster_detection_method="deactivate"
            )
    except Exception as error:  # of Python, of gRPC and of JAX, each in words of its own
        how = ": give --coordinator_address=HOST:PORT instead" if coordinator == AUTO else ""
        raise UserError(f"the processes could not be joined ({reason(error)}){how}.") from error
    if threading.current_thread() is threading.main_thread():
        # JAX has put a handler of its own under Python's, which would not hear of the signal any more.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if jax.process_count() > 1:
        try:
            _watch.connect("" if coordinator == AUTO else _parts(coordinator)[0])
        except OSError as error:
            warn(
                f"the processes cannot watch each other ({reason(error)}): if one is lost, JAX ends the others after "
                "some minutes."
            )


def _parts(coordinator: str) -> tuple[str, int]:
    """HOST:PORT -> host, port; an IPv6 address stands in brackets."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _find(coordinator: str) -> None:
    """Waits until the first process listens; JAX, left alone with nobody, ends by a trace of its C++.

    Raises UserError where it does not.
    """
    until, error = time.monotonic() + _FOUND_SECONDS, None
    while time.monotonic() < until:
        try:
            socket.create_connection(_parts(coordinator), _WORD_SECONDS).close()
            return
        except OSError as fault:
            error = fault
            time.sleep(1.0)
    raise UserError(
        f"--coordinator_address={coordinator}: nobody listens there ({error}): start the first process, on that host "
        "and with that port, within some minutes of the others."
    )


def agree_to_end() -> None:
    """Tells the others that this process will end, and that this is no loss: all will, or its work is done."""
    _watch.say(_BYE)


def end_watch(code: int) -> bool:
    """To be called before a process ends with this code; whether it then has to end at once.

    JAX would wait for the others at the exit, and they for this one. The first process lets others that are about to
    end go before it: JAX would end them by a trace when it is gone.
    """
    if not _watch.connections:
        return False
    if code == 0:
        agree_to_end()
        return False
    _watch.is_ending = True
    if code in (_INTERRUPTED, _TERMINATED):
        _watch.say(bytes([code]))
    until = time.monotonic() + (_LAST_SECONDS if jax.process_index() == 0 else 0.0)
    for listener in _watch.listeners:
        listener.join(max(until - time.monotonic(), 0.0))
    return True


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

    def say(self, word: bytes) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.sendall(word)

    def connect(self, host: str) -> None:
        """host: where the first process is, if that is known. Raises OSError."""
        if jax.process_index() == 0:
            with _server() as server:
                token = secrets.token_bytes(_TOKEN_BYTES)
                _from_first(f"{host or _own_address()} {server.getsockname()[1]} {token.hex()}")
                server.settimeout(_CONNECT_SECONDS)
                while len(self.connections) < jax.process_count() - 1:
                    connection, _ = server.accept()
                    connection.settimeout(_CONNECT_SECONDS)
                    said = connection.recv(_TOKEN_BYTES + 4)
                    if said[:_TOKEN_BYTES] == token:  # not somebody who tries all ports
                        self._add(connection, int.from_bytes(said[_TOKEN_BYTES:], "little"))
        else:
            host, port, token = _from_first("").split()
            connection = socket.create_connection((host, int(port)), _CONNECT_SECONDS)
            connection.sendall(bytes.fromhex(token) + jax.process_index().to_bytes(4, "little"))
            self._add(connection, 0)

    def _add(self, connection: socket.socket, number: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener = threading.Thread(target=self._listen, args=(connection, number), daemon=True)
        self.connections.append(connection)
        self.listeners.append(listener)
        listener.start()

    def _listen(self, connection: socket.socket, number: int) -> None:
        """Ends this process where that of this number ends, but not by agreement."""
        said = b""
        with contextlib.suppress(OSError):
            while more := connection.recv(1):
                said += more
        until = time.monotonic() + _OWN_SECONDS
        while not (self.is_ending or said[:1] == _BYE) and time.monotonic() < until:
            time.sleep(0.05)  # it may have met the same error, and then says so itself
        if self.is_ending or said[:1] == _BYE:
            return
        which = f"process {number} of {jax.process_count()}"
        what = f"error: {which} has ended, and this one with it: see what that one said"
        if said:
            what = f"stopped with {which}"
        os.write(2, f"\n{what}; the same commands on all hosts continue.\n".encode())
        os._exit(said[0] if said else 1)


_watch = _Watch()


def _own_address() -> str:
    """That by which others reach this host; no packet is sent for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))
        return probe.getsockname()[0]


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
