"""Who calls: a JWT becomes one of our two roles and its claims, or the request is refused.

Two ways to be believed, never mixed. A token whose `iss` is a configured issuer counts if a key of that issuer's JWKS
signed it, by RS256 or ES256. Any other token counts if PGCREDITS_JWT_SECRET signed it, by HS256. What a token says of
its own keys (jku, x5u, jwk, x5c) is never looked at. The role comes from our list; credits_service only from the
secret, or an issuer marked for it.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jwt
from jwt.exceptions import InvalidSubjectError
from starlette.requests import Request

from pgcredits.answers import Refused, not_now
from pgcredits.settings import Issuer, Settings, SettingsError

USER, SERVICE = "credits_user", "credits_service"
ROLES = {None: USER, USER: USER, "authenticated": USER, SERVICE: SERVICE}  # by the claim; the second is Supabase's word
ASYMMETRIC = ["RS256", "ES256"]
MIN_SECRET = 32  # bytes: shorter than its hash, a secret can be guessed from one token
MAX_HEADER = 8192  # bytes
LEEWAY = 30  # seconds between clocks
KEYS_LAST = 600  # seconds
FETCH = 3.0  # seconds for an issuer to answer; meanwhile its other callers wait
REST = 5.0  # seconds after an issuer did not answer, in which it is not asked again

EXPLAINED: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "JWT expired",
    jwt.ImmatureSignatureError: "JWT not yet valid",
    jwt.InvalidAudienceError: "JWT not in audience",
    jwt.MissingRequiredClaimError: "JWT lacks the claim {claim}",
    jwt.InvalidIssuerError: "JWT of another issuer",
    InvalidSubjectError: "JWT subject is no text",
    jwt.InvalidIssuedAtError: "JWT time of issue is no number",
}


@dataclass(frozen=True)
class Caller:
    """A role of the database and what the token claims, as JSON text."""

    role: str
    claims: str


class IssuerDown(Exception):  # noqa: N818 - it says what is the case
    """The keys of an issuer cannot be had at the moment."""


class Keys(jwt.PyJWKClient):
    """The keys of one issuer. An issuer that does not answer is left alone for a while, whatever is asked of it."""

    _rests_until = 0.0

    def fetch_data(self) -> Any:
        """The key set from the configured address. Raises IssuerDown."""
        if time.monotonic() < self._rests_until:
            raise IssuerDown
        try:
            return super().fetch_data()
        except (jwt.PyJWTError, OSError, ValueError) as error:
            self._rests_until = time.monotonic() + REST
            raise IssuerDown(str(error)) from error


class Verifier:
    """Verifies tokens as the settings say. Raises SettingsError if they cannot be meant."""

    def __init__(self, settings: Settings) -> None:
        if settings.jwt_secret and len(settings.jwt_secret.encode()) < MIN_SECRET:
            raise SettingsError(f"PGCREDITS_JWT_SECRET must have at least {MIN_SECRET} bytes")
        self._secret, self._audience = settings.jwt_secret, settings.jwt_audience
        self._issuers: Mapping[str, Issuer] = settings.jwt_issuers
        self._keys = {
            name: Keys(issuer.jwks, lifespan=KEYS_LAST, timeout=FETCH) for name, issuer in self._issuers.items()
        }
        # A fetch blocks, and takes its time, which must not be that of other issuers. Its client does one at a time.
        self._threads = {name: ThreadPoolExecutor(1, "jwks") for name in self._issuers}

    @property
    def roles(self) -> list[str]:
        """Every role that a token may have here; none where nobody is believed."""
        services = self._secret or any(issuer.service for issuer in self._issuers.values())
        return [USER, SERVICE] if services else [USER] if self._issuers else []

    async def caller(self, request: Request) -> Caller:
        """Who sent a request. Raises Refused: 401 no or a bad token, 403 not our role, 503 the issuer is down."""
        given = request.headers.getlist("authorization")
        match = re.fullmatch(r"(?i:bearer) +(\S+)", given[0].strip()) if given else None
        if not match:
            raise _unauthenticated("PGRST302", "Anonymous access is disabled")
        if len(given) > 1 or len(given[0]) > MAX_HEADER or not re.fullmatch(r"[\w.-]+", match[1], re.ASCII):
            raise _unauthenticated("PGRST301", "JWT cannot be read")
        if not self._secret and not self._issuers:
            raise Refused(500, "Server lacks JWT secret", "See PGCREDITS_JWT_SECRET.", code="PGRST300")
        try:
            return await self._verified(match[1])
        except IssuerDown as error:
            raise not_now("issuer_down", "The keys of the token's issuer cannot be had. Try again.") from error
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            said = EXPLAINED.get(type(error), "").format_map(vars(error))
            raise _unauthenticated(
                "PGRST303" if said else "PGRST301", said or "JWT cannot be verified", bad=True
            ) from error

    async def _verified(self, token: str) -> Caller:
        unverified = jwt.decode_complete(token, options={"verify_signature": False})
        name = unverified["payload"].get("iss")
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            claims = self._decoded(token, self._secret, ["HS256"], self._audience, [])
        else:
            if unverified["header"].get("alg") not in ASYMMETRIC:
                raise jwt.InvalidAlgorithmError  # before its key is looked for
            loop = asyncio.get_running_loop()
            key = await loop.run_in_executor(
                self._threads[name], self._keys[name].get_signing_key, unverified["header"].get("kid")
            )
            claims = self._decoded(token, key, ASYMMETRIC, issuer.audience, ["iss", "sub"], issuer=name)
        role = ROLES.get(claims.get("role")) if isinstance(claims.get("role"), str | None) else None
        if role is None or (role == SERVICE and issuer and not issuer.service):
            raise Refused(403, "permission denied to set role", "The token's role is not one of ours.", code="42501")
        return Caller(role, json.dumps({**claims, "role": role}, allow_nan=False))  # NaN is no JSON: a bad token

    def _decoded(
        self, token: str, key: Any, algorithms: list[str], audience: tuple[str, ...], need: list[str], **more: Any
    ) -> dict[str, Any]:
        if not key:
            raise jwt.InvalidKeyError  # no secret is configured
        options: Any = {
            "require": ["exp", *need, *(["aud"] if audience else [])],
            "verify_aud": bool(audience),
            "enforce_minimum_key_length": True,
        }
        claims: dict[str, Any] = jwt.decode(
            token, key, algorithms, options, audience=audience or None, leeway=LEEWAY, **more
        )
        return claims


def _unauthenticated(code: str, message: str, *, bad: bool = False) -> Refused:
    challenge = f'Bearer error="invalid_token", error_description="{message}"' if bad else "Bearer"
    return Refused(401, message, None, {"WWW-Authenticate": challenge}, code=code)
