"""Where the nodes of a job meet. Needs nothing but the standard library."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Callable

from harness.errors import ConfigError

FIRST_PORT, NUM_PORTS = 12_000, 20_000
"""Below those that the kernel gives to outgoing connections."""
SIOCGIFADDR = 0x8915


def rendezvous_port(number: int, *, is_free: Callable[[int], bool]) -> int:
    """Return the port at which the ranks of a job meet: one that follows from its number, the next if it is taken.

    Raises:
        ConfigError: none of a hundred is free.
    """
    for attempt in range(100):
        port = FIRST_PORT + (number + 613 * attempt) % NUM_PORTS  # not the next one, which is that of the next job
        if is_free(port):
            return port
    raise ConfigError(f"no free port among a hundred from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS}; see ss -ltn")


def is_free(port: int) -> bool:
    """Whether this machine listens at no address on a port."""
    try:
        listener = socket.socket(socket.AF_INET6)  # which listens at the addresses of IPv4 as well
    except OSError:  # the kernel has it switched off
        listener = socket.socket(socket.AF_INET)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError:
            return False
    return True


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface of this node.

    Raises:
        ConfigError: there is none of that name, or it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"network_interface: {socket.gethostname()} has no address on {interface} ({error.strerror}); it has "
                f"the interfaces {names}"
            ) from error
    return socket.inet_ntoa(answer[20:24])
