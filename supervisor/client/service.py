"""The running service as its own commands see it: requests out, JSON or lines back, whatever is wrong in one line."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from config.resolve import ConfigError, resolve
from planner.errors import InvalidRequest, PlannerError

CONNECT_TIMEOUT_S: Final = 5.0  # a service on this machine, or on this network, accepts within milliseconds
MAX_LINE_BYTES: Final = 8 << 20  # an event with a whole answer in it; a longer one is no line of ours
MAX_ANSWER_BYTES: Final = 64 << 20  # the header of a model with all its tensors, as JSON
NEEDED: Final = frozenset({"host", "api_keys", "tls_cert"})  # of the settings, to ask a service
EVERYWHERE: Final[Mapping[str, str]] = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where to reach who listens so


class ServiceError(PlannerError):
    """The service cannot be reached, or refused. ``status`` is its HTTP status, None where it did not answer."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Service:
    """Where the service answers. ``tls`` is None where it speaks plain HTTP."""

    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        """Return its address as people write it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls is None else 'https'}://{host}:{self.port}"

    def get(self, path: str) -> Any:
        """Return the JSON that the service answers. Raises ServiceError."""
        with self._answer("GET", path, None, {}) as answer, self._reached():
            return _json(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that the service answers, which may take as long as a load. Raises ServiceError."""
        with self._answer("POST", path, _encoded(body), {}) as answer, self._reached():
            return _json(answer)

    def send(self, path: str, chunks: Iterable[bytes], size_bytes: int) -> None:
        """Post so many bytes as they are. Raises ServiceError."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
        with self._answer("POST", path, chunks, headers):
            pass

    @contextmanager
    def lines(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[Iterator[str]]:
        """Yield the answer's lines as they come. Leaving early closes the connection, at which the work stops."""
        with self._answer(method, path, _encoded(body), headers or {}) as answer:
            yield self._lines(answer)

    @contextmanager
    def _answer(
        self, method: str, path: str, body: bytes | Iterable[bytes] | None, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        try:
            with self._reached():
                answer = self._asked(connection, method, path, body, headers)
            yield answer
        finally:
            connection.close()

    def _asked(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        sent = {"Content-Type": "application/json", **headers}
        if self.api_key is not None:
            sent["Authorization"] = f"Bearer {self.api_key}"
        connection.connect()
        connection.sock.settimeout(None)  # a load takes minutes; Ctrl-C ends the wait
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent: the answer says why
            connection.request(method, path, body, sent)
        answer = connection.getresponse()
        if answer.status >= HTTPStatus.BAD_REQUEST:
            raise ServiceError(_refusal(answer), status=answer.status)
        return answer

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Raise ServiceError for what goes wrong with the connection meanwhile."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise ServiceError(self._unreachable(error)) from None

    def _lines(self, answer: http.client.HTTPResponse) -> Iterator[str]:
        while line := self._line(answer):
            if len(line) > MAX_LINE_BYTES:
                raise ServiceError(f"a line of the answer is longer than {MAX_LINE_BYTES} bytes")
            yield line.decode("utf-8", "replace").rstrip("\r\n")

    def _line(self, answer: http.client.HTTPResponse) -> bytes:
        with self._reached():
            return answer.readline(MAX_LINE_BYTES + 1)

    def _connection(self) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_TIMEOUT_S)
        return http.client.HTTPSConnection(self.host, self.port, timeout=CONNECT_TIMEOUT_S, context=self.tls)

    def _unreachable(self, error: Exception) -> str:
        if isinstance(error, ConnectionRefusedError):
            return f"no service answers at {self.url}; start one with `planner serve`, or set PLANNER_HOST"
        if isinstance(error, socket.gaierror):
            return f"there is no host {self.host}; set PLANNER_HOST to where the service runs"
        if isinstance(error, ssl.SSLError):
            return f"{self.url} does not speak TLS as expected: {error.reason or error}; see PLANNER_TLS_CERT"
        story = str(error) or type(error).__name__
        return f"the connection to {self.url} broke: {story}; the service's log tells more"


def service(environ: Mapping[str, str]) -> Service:
    """Return the service that this environment's settings describe. Raises InvalidRequest for bad ones.

    What is odd about them is told on stderr: it may not be the service that is meant.
    """
    resolved = resolve(environ, fields=NEEDED)
    for warning in resolved.warnings:
        sys.stderr.write(f"planner: warning: {warning}\n")
    if resolved.problems:
        raise InvalidRequest(str(ConfigError(resolved.problems)))
    values = resolved.by_field()
    address, keys, certificate = values["host"], values["api_keys"], values["tls_cert"]
    tls = None if certificate is None else _trusting(certificate)
    return Service(EVERYWHERE.get(address.host, address.host), address.port, keys[0] if keys else None, tls)


def _trusting(certificate: Path) -> ssl.SSLContext:
    """Return a context that trusts this very certificate, whoever signed it and whatever name it is for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(certificate)
    except OSError as error:  # ssl.SSLError among them
        raise InvalidRequest(f"PLANNER_TLS_CERT: {certificate} cannot be used: {error.strerror or error}") from None
    return context


def _encoded(body: Mapping[str, Any] | None) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _json(answer: http.client.HTTPResponse) -> Any:
    text = answer.read(MAX_ANSWER_BYTES + 1)
    if len(text) > MAX_ANSWER_BYTES:
        raise ServiceError(f"the service's answer is longer than {MAX_ANSWER_BYTES} bytes")
    try:
        return json.loads(text) if text else {}
    except ValueError:
        raise ServiceError("the service's answer is no JSON: is another program listening there?") from None


def _refusal(answer: http.client.HTTPResponse) -> str:
    """Return the one line that the service says, in OpenAI's envelope or in Ollama's."""
    text = answer.read(MAX_ANSWER_BYTES)
    error: Any = None
    with suppress(ValueError, AttributeError):
        error = json.loads(text).get("error")
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str):
        message = f"the service answered {answer.status} {answer.reason}"
    if answer.status == HTTPStatus.UNAUTHORIZED:
        message += "; put the key into PLANNER_API_KEYS"
    return message
