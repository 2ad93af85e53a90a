"""The health checks of a worker over HTTP, for Kubernetes, Docker and load balancers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nqnb.errors import HealthUnavailable
from nqnb.http_endpoint import HttpEndpoint
from nqnb.listen_address import ListenAddress


class HealthEndpoint(HttpEndpoint):
    """An HTTP server, in a separate thread, that answers ``/healthz`` and ``/readyz``.

    Args:
        address: the address; port 0 means any free port.
        failure: a function that returns the reason why the worker must be restarted, or "". ``/healthz`` calls the
            function in another thread.
        not_ready: a function that returns the reason why the worker cannot receive cancels and tasks, or "".
            ``/readyz`` calls the function in another thread.

    Raises:
        HealthUnavailable: the address cannot be used.
    """

    def __init__(self, address: ListenAddress, failure: Callable[[], str], not_ready: Callable[[], str]) -> None:
        self._checks = {"/healthz": failure, "/readyz": not_ready}
        super().__init__(address, self._answer, "health checks", HealthUnavailable)

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        check = self._checks.get(str(environ.get("PATH_INFO")))
        if check is None:
            status, text = "404 Not Found", f"not found: use {' or '.join(self._checks)}"
        else:
            why = check()
            status, text = ("503 Service Unavailable", why) if why else ("200 OK", "ok")
        body = f"{text}\n".encode()
        headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": f"{len(body)}"}
        start_response(status, [*headers.items(), ("Cache-Control", "no-store")])
        return [body]
