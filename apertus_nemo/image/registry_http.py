"""HTTP as registries speak it: retries with back-off, redirects, Bearer and Basic authentication, limits on everything.

    with Session(reference, environment=os.environ) as session:
        data = session.call(Ask("GET", session.url("tags/list"), scope="pull", expect=(200,), handle=...))

Nothing that a server says is trusted: a body is read to a given size and at a least speed, redirects are counted and
never lead from TLS to plain HTTP, credentials go to the registry and to the token service that it names, and nowhere
else. No secret and no query of an URL (it may hold a signature) is in any message.
"""

from __future__ import annotations

import email.utils
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, Generic, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import httpx

from apertus_nemo import __version__
from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.image.credentials import Credential, Credentials
from apertus_nemo.image.reference import Reference

T = TypeVar("T")

_REDIRECTS = {301, 302, 303, 307, 308}
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_MAX_REDIRECTS = 5
_MAX_TOKEN_BYTES = 2**20
_MAX_ERROR_BYTES = 2**16
_BLOCK_BYTES = 2**20
_PROGRESS_BYTES = 2**20  # so much more of a body, and the count of attempts begins again
_PARAMETER = re.compile(r'([A-Za-z_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED\] certificate verify failed: (.*?)(?: \(_ssl|\Z)")


@dataclass(frozen=True)
class Limits:
    """How long and how often."""

    connect_s: float = 15.0
    idle_s: float = 30.0  # without a byte
    attempts: int = 6
    backoff_s: float = 0.5  # before the second attempt; doubles
    max_wait_s: float = 60.0  # of one pause, whatever the server asks
    window_s: float = 30.0  # a body must bring `window_bytes` in it
    window_bytes: int = 64 * 1024
    jobs: int = 4  # blobs at once


LIMITS = Limits()


class Interrupted(ApertusError):
    """Another blob failed, or the user stopped: this one is given up. Never shown."""


class NotFound(InputError):
    """The registry has nothing of that name."""


class Again(Exception):
    """An attempt failed in a way that another may not."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Answer:
    """What a server answered; its body is read once."""

    def __init__(self, response: httpx.Response, limits: Limits, clock: Callable[[], float]) -> None:
        self._response, self._limits, self._clock = response, limits, clock
        self.status = response.status_code

    def header(self, name: str) -> str:
        """A header's value, or nothing."""
        return str(self._response.headers.get(name, ""))

    @property
    def length_bytes(self) -> int | None:
        """What Content-Length says."""
        text = self.header("Content-Length")
        return int(text) if text.isdecimal() and len(text) < 20 else None

    def blocks(self, max_bytes: int) -> Iterator[bytes]:
        """The body, block by block. More than `max_bytes` is the server's fault, for which Differs is raised."""
        size, mark, since = 0, 0, self._clock()
        for block in self._response.iter_raw():
            size += len(block)
            if size > max_bytes:
                raise Differs(f"the registry sends more than the {max_bytes} bytes that were announced")
            yield block
            now = self._clock()
            if now - since > self._limits.window_s:
                if size - mark < self._limits.window_bytes:
                    raise Again(f"sent fewer than {self._limits.window_bytes} bytes in {self._limits.window_s:.0f} s")
                mark, since = size, now

    def read(self, *, max_bytes: int) -> bytes:
        """The whole body."""
        return b"".join(self.blocks(max_bytes))


@dataclass(frozen=True)
class Ask(Generic[T]):
    """A request, and what takes its answer.

    `headers` and `content` are made anew for each attempt; `position` says how far the transfer is, and a step forward
    makes all attempts available again.
    """

    method: str
    url: str
    scope: str  # of a token: "pull", "pull,push"
    expect: tuple[int, ...]
    handle: Callable[[Answer], T]
    headers: Callable[[], Mapping[str, str]] = dict
    content: Callable[[], IO[bytes] | bytes | None] = lambda: None
    position: Callable[[], int] = lambda: 0
    what: str = ""  # begins every message; default: the repository


class Session:
    """Connections to one repository of a registry; may be used by several threads."""

    def __init__(
        self,
        reference: Reference,
        *,
        environment: Mapping[str, str],
        insecure: bool = False,
        limits: Limits = LIMITS,
        sleep: Callable[[float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`insecure` allows any certificate, and plain HTTP, as a registry on this machine is spoken to."""
        self.registry, self.repository = reference.registry, reference.repository
        self._host = "registry-1.docker.io" if self.registry in ("docker.io", "index.docker.io") else self.registry
        self._insecure, self._plain_allowed = insecure, insecure or reference.is_loopback
        self.limits, self._clock = limits, clock
        self.stop = threading.Event()  # set: every transfer ends
        self._sleep = sleep or (lambda seconds: void(self.stop.wait(seconds)))
        self._credentials = Credentials(environment)
        self._credential: Credential | None = None
        self._looked = False
        self._tokens: dict[str, str] = {}  # scope -> Authorization
        self._lock = threading.Lock()
        context = ssl.create_default_context()
        if insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self._client = httpx.Client(
            verify=context,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(limits.idle_s, connect=limits.connect_s),
            limits=httpx.Limits(max_connections=4 * limits.jobs, max_keepalive_connections=limits.jobs),
            headers={"User-Agent": f"apertus-nemo/{__version__}", "Accept-Encoding": "identity"},
            mounts=_proxies(environment, context) if not reference.is_loopback else None,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @cached_property
    def base(self) -> str:
        """Scheme and host: plain HTTP where the registry is on this machine, or where it is allowed and TLS fails."""
        secure = f"https://{self._host}"
        if self._insecure:
            try:
                self._client.send(self._client.build_request("GET", f"{secure}/v2/"), stream=True).close()
                return secure
            except (httpx.TransportError, ssl.SSLError):
                pass
        return f"http://{self._host}" if self._plain_allowed else secure

    def url(self, path: str) -> str:
        """That of something in the repository ("manifests/latest")."""
        return f"{self.base}/v2/{self.repository}/{path}"

    def call(self, ask: Ask[T]) -> T:
        """Ask until there is an answer with an expected status, and hand it to `ask.handle`, whose result is returned.

        Raises NotFound for 404, UnfitEnvironment for what the network, the registry or its rights do not allow, and
        what `handle` raises.
        """
        what = ask.what or f"{self.registry}/{self.repository}"
        failures, before = 0, ask.position()
        while True:
            if self.stop.is_set():
                raise Interrupted("stopped")
            try:
                return self._attempt(ask, what)
            except (Again, httpx.TransportError, ssl.SSLError) as error:
                reason = str(error) if isinstance(error, Again) else _reason(error)
                here = ask.position()
                if here - before >= _PROGRESS_BYTES:
                    failures, before = 0, here
                failures += 1
                if failures >= self.limits.attempts or _hopeless(error):
                    times = f" ({failures} attempts)" if failures > 1 else ""
                    raise UnfitEnvironment(f"{what}: {self.registry} {reason}{times}") from None
                wait_s = error.wait_s if isinstance(error, Again) else None
                wait_s = self.limits.backoff_s * 2 ** (failures - 1) if wait_s is None else wait_s
                self._sleep(min(wait_s, self.limits.max_wait_s))

    def _attempt(self, ask: Ask[T], what: str) -> T:
        sent = self._tokens.get(ask.scope)
        for _ in range(2):  # without, then with an answer to the registry's challenge
            response = self._follow(ask, sent, what)
            try:
                answer = Answer(response, self.limits, self._clock)
                if answer.status in ask.expect:
                    return ask.handle(answer)
                if answer.status == 401 and _same_origin(str(response.url), ask.url):
                    challenge = response.headers.get_list("WWW-Authenticate")
                    fresh = self._authorization(challenge, ask.scope, refused=sent, what=what)
                    if fresh != sent:
                        sent = fresh
                        continue
                raise self._refusal(answer, what)
            finally:
                response.close()
        raise self._unauthorized(what)

    def _follow(self, ask: Ask[T], authorization: str | None, what: str) -> httpx.Response:
        """Send, and follow redirects of what has no body; the Authorization header stays with its origin."""
        url, headers = ask.url, dict(ask.headers())
        for _ in range(_MAX_REDIRECTS + 1):
            self._check_scheme(url, what)
            sent = dict(headers)
            if authorization and _same_origin(url, self.base):
                sent["Authorization"] = authorization
            body = ask.content()
            try:
                request = self._client.build_request(ask.method, url, headers=sent, content=body)
                response = self._client.send(request, stream=True)
            finally:
                if body is not None and not isinstance(body, bytes):
                    body.close()
            if response.status_code not in _REDIRECTS or ask.method not in ("GET", "HEAD"):
                return response
            location = response.headers.get("Location", "")
            response.close()
            if not location:
                raise UnfitEnvironment(f"{what}: {self.registry} redirects to nowhere")
            url = join(url, location, what)
            if urlsplit(ask.url).scheme == "https" and urlsplit(url).scheme != "https" and not self._plain_allowed:
                raise UnfitEnvironment(f"{what}: {self.registry} redirects from TLS to {_shown(url)}: refused")
        raise UnfitEnvironment(f"{what}: {self.registry} redirects more than {_MAX_REDIRECTS} times")

    def _check_scheme(self, url: str, what: str) -> None:
        scheme = urlsplit(url).scheme
        if scheme != "https" and not (scheme == "http" and self._plain_allowed):
            raise UnfitEnvironment(f"{what}: {_shown(url)} is not reached over TLS; --insecure allows it")

    def _authorization(self, challenges: list[str], scope: str, *, refused: str | None, what: str) -> str | None:
        """The header that answers a challenge; raises UnfitEnvironment where we cannot."""
        with self._lock:
            known = self._tokens.get(scope)
            if known is not None and known != refused:  # another thread has just got it
                return known
            if not self._looked:
                self._credential = self._credentials.find(self.registry, self.repository)
                self._looked = True
            found = self._answer(challenges, scope, what)
            if found is None or (found == refused):
                raise self._unauthorized(what)
            self._tokens[scope] = found
            return found

    def _answer(self, challenges: list[str], scope: str, what: str) -> str | None:
        for challenge in challenges:
            scheme, _, rest = challenge.strip().partition(" ")
            if scheme.lower() == "bearer":
                fields = {m[1].lower(): m[2] if m[2] is not None else m[3] for m in _PARAMETER.finditer(rest)}
                return self._token(fields, scope, what)
            if scheme.lower() == "basic" and self._credential is not None and self._credential.user:
                return self._credential.basic()
        return None

    def _token(self, fields: Mapping[str, str], scope: str, what: str) -> str:
        """A Bearer token (distribution: docs/spec/auth/token.md, and oauth.md for identity tokens)."""
        realm = join(self.base, fields.get("realm", ""), what)
        self._check_scheme(realm, what)
        wanted = {"service": fields.get("service", ""), "scope": f"repository:{self.repository}:{scope}"}
        headers, credential = {"Accept": "application/json"}, self._credential
        if credential is not None and credential.identity_token:
            form = {
                **wanted,
                "grant_type": "refresh_token",
                "client_id": "apertus-nemo",
                "refresh_token": credential.identity_token,
            }
            request = self._client.build_request("POST", realm, headers=headers, data=form)
        else:
            if credential is not None:
                headers["Authorization"] = credential.basic()
            joint = "&" if urlsplit(realm).query else "?"
            request = self._client.build_request("GET", realm + joint + urlencode(wanted), headers=headers)
        response = self._client.send(request, stream=True)
        try:
            answer = Answer(response, self.limits, self._clock)
            if answer.status in (401, 403):
                raise self._unauthorized(what)
            if answer.status != 200:
                raise self._refusal(answer, f"{what}: the token service {urlsplit(realm).hostname}")
            token = _token_of(answer.read(max_bytes=_MAX_TOKEN_BYTES))
        finally:
            response.close()
        if token is None:
            raise UnfitEnvironment(f"{what}: the token service {urlsplit(realm).hostname} gave no token")
        return f"Bearer {token}"

    def _unauthorized(self, what: str) -> UnfitEnvironment:
        if self._credential is None:
            return UnfitEnvironment(
                f"{what}: {self.registry} wants credentials, and none were found; "
                f"`podman login {self.registry}` keeps some"
            )
        return UnfitEnvironment(
            f"{what}: {self.registry} refuses the credentials from {self._credential.source}; log in again"
        )

    def _refusal(self, answer: Answer, what: str) -> Exception:
        status = answer.status
        if status in _RETRIED:
            return Again(f"answers {status}{_said(answer)}", _retry_after(answer.header("Retry-After")))
        if status == 401:
            return self._unauthorized(what)
        if status == 403:
            return UnfitEnvironment(f"{what}: {self.registry} does not allow it (403){_said(answer)}")
        if status == 404:
            return NotFound(f"{what}: {self.registry} has no such thing (404){_said(answer)}")
        return UnfitEnvironment(f"{what}: {self.registry} answers {status}{_said(answer)}")


def join(base: str, address: str, what: str) -> str:
    """An address that a server names, absolute; raises UnfitEnvironment where it is none."""
    try:
        url = urljoin(base, address)
        httpx.URL(url)
        urlsplit(url).port  # noqa: B018 (raises for what is no number)
    except (ValueError, httpx.InvalidURL):
        raise UnfitEnvironment(f"{what}: {_shown(base)} names an address that is not one") from None
    return url


def void(_: object) -> None:
    """Nothing, of anything."""


def _token_of(data: bytes) -> str | None:
    import json

    try:
        tree = json.loads(data)
        token = tree.get("token") or tree.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        return None
    return token if isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token) else None


def _said(answer: Answer) -> str:
    """ ": CODE: message" from the body of an error, as the distribution specification has it; nothing otherwise."""
    import json

    try:
        first = json.loads(answer.read(max_bytes=_MAX_ERROR_BYTES))["errors"][0]
        text = f"{first['code']}: {first.get('message') or ''}".strip(": ")
    except Exception:  # a body of any kind, or none, or one that breaks off: the status says enough
        return ""
    return ": " + (text if text.isprintable() else ascii(text)[1:-1])[:200]


def _retry_after(text: str) -> float | None:
    """Seconds, from a number or a date."""
    if text.isdecimal():
        return float(text[:9])
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return "does not answer"
    if isinstance(error, httpx.TimeoutException):
        return "stopped sending"
    if isinstance(error, httpx.ConnectError) and (untrusted := _UNTRUSTED.search(str(error))):
        return (
            f"shows a certificate that is not trusted ({untrusted[1][:200]}); SSL_CERT_FILE names a file of those to "
            "trust, --insecure takes any"
        )
    if isinstance(error, httpx.ConnectError):
        return f"cannot be reached: {str(error)[:200] or 'no connection'}"
    if isinstance(error, httpx.RemoteProtocolError):
        return f"broke off: {str(error)[:200]}"
    return f"broke off: {str(error)[:200] or type(error).__name__}"


def _hopeless(error: Exception) -> bool:
    """Whether another attempt would end alike: a certificate, a name that is none."""
    text = str(error)
    return "CERTIFICATE_VERIFY_FAILED" in text or "WRONG_VERSION_NUMBER" in text or "not known" in text


def _same_origin(one: str, other: str) -> bool:
    def origin(url: str) -> tuple[str, str | None, int | None]:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            return "", None, None
        return parts.scheme, parts.hostname, port or {"https": 443, "http": 80}.get(parts.scheme)

    return origin(one) == origin(other) != ("", None, None)


def _shown(url: str) -> str:
    """Scheme and host, without user, path and query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2][:100]
    return f"{parts.scheme[:20]}://{host if host.isprintable() else ascii(host)[1:-1]}"


def _proxies(environment: Mapping[str, str], context: ssl.SSLContext) -> Mapping[str, Any] | None:
    """httpx's mounts for HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY."""
    named = {key[:-6].lower(): value for key, value in environment.items() if key.lower().endswith("_proxy") and value}
    bypassed = named.get("no", "")
    mounts: dict[str, Any] = {}
    for scheme in ("https", "http"):
        if proxy := named.get(scheme) or named.get("all"):
            mounts[f"{scheme}://"] = _Proxied(
                httpx.HTTPTransport(proxy=proxy if "://" in proxy else f"http://{proxy}", verify=context),
                httpx.HTTPTransport(verify=context),
                bypassed,
            )
    return mounts or None


class _Proxied(httpx.BaseTransport):
    """Through a proxy, but for the hosts of NO_PROXY."""

    def __init__(self, proxied: httpx.BaseTransport, direct: httpx.BaseTransport, bypassed: str) -> None:
        self._proxied, self._direct, self._bypassed = proxied, direct, bypassed

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host if request.url.port is None else f"{request.url.host}:{request.url.port}"
        around = urllib.request.proxy_bypass_environment(host, {"no": self._bypassed})  # type: ignore[attr-defined]
        return (self._direct if around else self._proxied).handle_request(request)

    def close(self) -> None:
        self._proxied.close()
        self._direct.close()
