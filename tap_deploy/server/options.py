"""Options of the server."""

from __future__ import annotations

import dataclasses
import ipaddress

from tap_deploy.errors import InputError, require_int

MIB = 1 << 20
MIN_TOKEN_LENGTH = 16  # characters

# Bounds of one request, whatever the machine.
MAX_REGIONS = 256
MAX_POINTS = 64  # per region
MAX_STROKE_POINTS = 10_000
MAX_POINTS_PER_SIDE = 64
MAX_TOP_K = 100

# The event loop parses JSON of these routes itself: a larger body would hold up everybody.
JSON_ROUTES = "/v1/images/"
MAX_JSON_BYTES = MIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where the server listens, and what it takes.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 for any free one.
        max_batch: regions that share a graph call, of one request or of several.
        max_wait_ms: how long a request may wait for others to share its graph calls, milliseconds.
        max_pixels: largest picture to decode, pixels.
        max_body_bytes: largest body of a request, bytes.
        max_pending: requests that are accepted but not answered yet; further ones get a 429.
        cache_bytes: bound on the embeddings of all pictures that are kept, bytes.
        timeout_s: time for a request from its last byte to the last byte of its answer, seconds.
        body_timeout_s: time for the head and for the body of a request to arrive, seconds each.
        max_connections: open connections; further ones get a 503.
        workers: threads that run graphs.
        token: what ``Authorization: Bearer`` must hold; None if anybody may ask.
        without_token: whether to listen on other interfaces than loopback without a token.

    Raises:
        InputError: invalid value, or the server would be open to the network without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_pixels: int = 50_000_000
    max_body_bytes: int = 32 * MIB
    max_pending: int = 64
    cache_bytes: int = 512 * MIB
    timeout_s: float = 60.0
    body_timeout_s: float = 20.0
    max_connections: int = 512
    workers: int = 2
    token: str | None = dataclasses.field(default=None, repr=False)
    without_token: bool = False

    def __post_init__(self) -> None:
        require_int("port", self.port, 0)
        counts = ("max_batch", "max_pixels", "max_body_bytes", "max_pending", "cache_bytes")
        for name in (*counts, "max_connections", "workers"):
            require_int(name, getattr(self, name), 1)
        for name in ("timeout_s", "body_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)!r}; expected seconds above 0")
        if not 0 <= self.max_wait_ms < float("inf"):
            raise InputError(f"max_wait_ms is {self.max_wait_ms!r}; expected 0 or more")
        if self.token is not None and not _is_token(self.token):
            raise InputError(
                f"the token has {len(self.token)} characters; expected at least {MIN_TOKEN_LENGTH} "
                "printable ASCII characters without spaces; make one with: openssl rand -hex 32"
            )
        if self.token is None and not self.without_token and not self.is_loopback:
            raise InputError(
                f"host {self.host} can be reached from other machines, and there is no token; pass "
                "--token-file FILE, or --without-token to let everybody in"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _is_token(text: str) -> bool:
    return len(text) >= MIN_TOKEN_LENGTH and all("!" <= letter <= "~" for letter in text)
