"""Where processes of one machine meet."""

import socket


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
