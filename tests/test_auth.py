"""Who is believed: every known attack on JWTs, keys that rotate, issuers that are down."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from starlette.requests import Request

from pgcredits import auth
from pgcredits.answers import Refused
from pgcredits.settings import Issuer, Settings, SettingsError

SECRET = "a secret of the tests that is long enough"
ISSUER, BACKEND = "https://id.example.com", "https://backend.example.com"
RSA, OTHER = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC = ec.generate_private_key(ec.SECP256R1())
PEM = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
JWK = {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "kid": "rsa", "use": "sig"}
EC_JWK = {**ECAlgorithm.to_jwk(EC.public_key(), as_dict=True), "kid": "ec", "use": "sig"}


class Jwks:
    """The keys of an issuer, on a server of our own."""

    def __init__(self) -> None:
        self.keys, self.status, self.fetches, self.text = [JWK, EC_JWK], 200, 0, ""
        jwks = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                jwks.fetches += 1
                self.send_response(jwks.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write((jwks.text or json.dumps({"keys": jwks.keys})).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/keys"
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def jwks() -> Iterator[Jwks]:
    server = Jwks()
    yield server
    server.close()


@pytest.fixture
def verifier(jwks: Jwks) -> auth.Verifier:
    """Our secret, an issuer of users, and one that may make services."""
    issuers = {ISSUER: Issuer(jwks.url, ("credits",)), BACKEND: Issuer(jwks.url, ("credits",), service=True)}
    return auth.Verifier(Settings(jwt_secret=SECRET, jwt_audience=("credits",), jwt_issuers=issuers))


def asked(*headers: bytes) -> Request:
    """A request with these headers Authorization."""
    return Request({"type": "http", "headers": [(b"authorization", header) for header in headers]})


def caller(verifier: auth.Verifier, token: str) -> auth.Caller:
    """Whom a token makes."""
    return asyncio.run(verifier.caller(asked(f"Bearer {token}".encode())))


def refused(verifier: auth.Verifier, *headers: bytes) -> tuple[int, str]:
    """Status and code of the answer to headers."""
    with pytest.raises(Refused) as caught:
        asyncio.run(verifier.caller(asked(*headers)))
    if caught.value.status == 401:
        assert (caught.value.headers or {})["WWW-Authenticate"].startswith("Bearer")
        assert '"' not in caught.value.message
    return caught.value.status, caught.value.code


def claims(**more: Any) -> dict[str, Any]:
    """Claims that are fine; one that is None is left out."""
    whole = {"sub": "alice", "aud": "credits", "exp": int(time.time()) + 60, "iss": ISSUER, **more}
    return {name: value for name, value in whole.items() if value is not None}


def signed(key: Any = RSA, algorithm: str = "RS256", header: dict[str, Any] | None = None, **more: Any) -> str:
    """A token of the issuer."""
    return jwt.encode(claims(**more), key, algorithm, {"kid": "rsa", **(header or {})})


def ours(secret: str = SECRET, algorithm: str = "HS256", **more: Any) -> str:
    """A token of our secret."""
    return jwt.encode(claims(**{"iss": None, **more}), secret, algorithm)


def b64(text: bytes | str | dict[str, Any]) -> str:
    """A part of a token."""
    raw = json.dumps(text).encode() if isinstance(text, dict) else text.encode() if isinstance(text, str) else text
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forged(header: dict[str, Any], key: bytes | None, payload: Any = None) -> str:
    """A token made by hand, signed by HMAC with any key, or not signed."""
    start = f"{b64({'typ': 'JWT', **header})}.{b64(claims() if payload is None else payload)}"
    return f"{start}.{b64(hmac.new(key, start.encode(), hashlib.sha256).digest()) if key else ''}"


def test_those_who_are_believed(verifier: auth.Verifier) -> None:
    for token in (signed(), signed(EC, "ES256", {"kid": "ec"}), ours(), ours(aud=["x", "credits"]), ours(sub=None)):
        found = caller(verifier, token)
        assert found.role == "credits_user"
        assert json.loads(found.claims)["role"] == "credits_user"
    assert json.loads(caller(verifier, signed(org={"id": "o"}, n=1.5)).claims)["org"] == {"id": "o"}
    assert caller(verifier, ours(exp=int(time.time()) - 20)).role == "credits_user"  # clocks differ
    assert asyncio.run(verifier.caller(asked(b"bearer  " + ours().encode()))).role == "credits_user"


def test_the_role_comes_from_our_list(verifier: auth.Verifier) -> None:
    service: dict[str, Any] = {"role": "credits_service"}
    assert caller(verifier, ours(**service)).role == "credits_service"
    assert caller(verifier, signed(iss=BACKEND, **service)).role == "credits_service"
    assert caller(verifier, signed(role="authenticated")).role == "credits_user"
    assert refused(verifier, b"Bearer " + signed(**service).encode()) == (403, "42501")
    wrong: Any
    for wrong in (
        "postgres",
        "credits_owner",
        "credits_forwarder",
        "",
        'a"; set role x',
        5,
        ["credits_user"],
        {},
        True,
    ):
        assert refused(verifier, b"Bearer " + ours(role=wrong).encode()) == (403, "42501"), wrong


BAD: dict[str, Callable[[], str]] = {
    "not signed": lambda: forged({"alg": "none"}, None),
    "not signed, in other letters": lambda: forged({"alg": "nOnE"}, None, claims(iss=None)),
    "not signed, ours": lambda: forged({"alg": "none"}, None, claims(iss=None)),
    "no algorithm": lambda: forged({}, SECRET.encode()),
    "an algorithm that is none": lambda: forged({"alg": ["HS256"]}, SECRET.encode()),
    "an empty signature": lambda: ours().rpartition(".")[0] + ".",
    "no signature": lambda: ours().rpartition(".")[0],
    "the public key as a secret": lambda: forged({"alg": "HS256", "kid": "rsa"}, PEM),
    "the published key as a secret": lambda: forged({"alg": "HS256", "kid": "rsa"}, json.dumps(JWK).encode()),
    "the public key as our secret": lambda: forged({"alg": "HS256"}, PEM, claims(iss=None)),
    "our secret for an issuer": lambda: forged({"alg": "HS256"}, SECRET.encode()),
    "an issuer's key for us": lambda: signed(iss=None),
    "an empty secret": lambda: forged({"alg": "HS256"}, b"\0", claims(iss=None)),
    "another secret": lambda: ours("another secret that is long enough"),
    "another key": lambda: signed(OTHER),
    "another algorithm of our secret": lambda: ours(algorithm="HS512", secret=SECRET * 2),
    "another algorithm of the key": lambda: signed(algorithm="RS512"),
    "a padded algorithm of the key": lambda: signed(algorithm="PS256"),
    "the other key's algorithm": lambda: signed(EC, "ES256"),
    "its own key": lambda: signed(OTHER, header={"jwk": RSAAlgorithm.to_jwk(OTHER.public_key(), as_dict=True)}),
    "its own address of keys": lambda: signed(OTHER, header={"jku": "https://evil.example.com/keys"}),
    "its own certificate": lambda: signed(OTHER, header={"x5u": "https://evil.example.com/c", "x5c": ["MIIB"]}),
    "a critical extension": lambda: signed(header={"crit": ["exp2"], "exp2": 1}),
    "an unencoded payload": lambda: signed(header={"crit": ["b64"], "b64": False}),
    "no kid": lambda: jwt.encode(claims(), RSA, "RS256"),
    "a path as kid": lambda: signed(header={"kid": "../../../../dev/null"}),
    "SQL as kid": lambda: signed(header={"kid": "x' union select 'secret"}),
    "a kid that is no text": lambda: forged({"alg": "RS256", "kid": {"a": 1}}, b"x"),
    "another issuer": lambda: signed(iss="https://evil.example.com"),
    "an issuer with more": lambda: signed(iss=ISSUER + "/"),
    "an issuer that is no text": lambda: forged({"alg": "RS256"}, b"x", claims(iss=[ISSUER])),
    "no number": lambda: ours(n=float("nan")),
    "an endless number": lambda: ours(n=float("inf")),
    "another's claims": lambda: ".".join(
        [ours().split(".")[0], b64(claims(iss=None, sub="bob")), ours().split(".")[2]]
    ),
    "an array": lambda: forged({"alg": "HS256"}, SECRET.encode(), "[1]"),
    "no JSON": lambda: forged({"alg": "HS256"}, SECRET.encode(), "{"),
    "deep JSON": lambda: forged({"alg": "HS256"}, SECRET.encode(), "[" * 4000),
    "an endless time": lambda: forged({"alg": "HS256"}, SECRET.encode(), '{"aud": "credits", "exp": 1e999}'),
    "five parts": lambda: "a.b.c.d.e",
    "one part": lambda: "abc",
    "letters of others": lambda: "é" + ours(),
    "padding": lambda: ours() + "==",
    "too long": lambda: ours(more="x" * 9000),
}


@pytest.mark.parametrize("attack", BAD)
def test_nobody_else_is_believed(verifier: auth.Verifier, jwks: Jwks, attack: str) -> None:
    assert refused(verifier, f"Bearer {BAD[attack]()}".encode("latin-1")) == (401, "PGRST301")
    assert jwks.fetches <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"exp": 1}, {"exp": None}, {"exp": "soon"}, {"nbf": 4102444800}, {"iat": 4102444800}, {"aud": "others"},
        {"aud": None}, {"aud": []}, {"aud": ["others"]}, {"aud": 5}, {"aud": "credits "}, {"sub": None},
    ],
)  # fmt: skip
def test_claims_that_do_not_hold(verifier: auth.Verifier, wrong: dict[str, Any]) -> None:
    tokens = [signed(**wrong), *([] if "sub" in wrong else [ours(**wrong)])]  # our own services need no subject
    for token in tokens:
        code = "PGRST301" if wrong == {"exp": "soon"} else "PGRST303"
        assert refused(verifier, f"Bearer {token}".encode()) == (401, code)


def test_a_claim_that_is_missing_is_named(verifier: auth.Verifier) -> None:
    missing: list[dict[str, Any]] = [{"exp": None}, {"aud": None}, {"sub": None}]
    for wrong in missing:
        with pytest.raises(Refused, match=f"JWT lacks the claim {min(wrong)}$"):
            asyncio.run(verifier.caller(asked(f"Bearer {signed(**wrong)}".encode())))


def test_headers_that_are_no_token(verifier: auth.Verifier) -> None:
    good = b"Bearer " + ours().encode()
    assert refused(verifier) == (401, "PGRST302")
    for header in (b"", b"Bearer", b"Bearer ", b"Basic YTpi", ours().encode(), good + b" " + good, b"Bearer\xa0a.b.c"):
        assert refused(verifier, header) == (401, "PGRST302"), header
    for headers in ((good, good), (good, b"Bearer x"), (good, b"")):
        assert refused(verifier, *headers) == (401, "PGRST301"), headers


def test_an_unknown_key_is_not_fetched_again_and_again(verifier: auth.Verifier, jwks: Jwks) -> None:
    for number in range(50):
        assert refused(verifier, b"Bearer " + signed(OTHER, header={"kid": f"k{number}"}).encode())[0] == 401
        assert refused(verifier, b"Bearer " + signed(iss=f"https://{number}.example.com").encode())[0] == 401
    assert jwks.fetches == 1
    assert caller(verifier, signed()).role == "credits_user"


def test_a_new_key_counts_after_a_while(verifier: auth.Verifier, jwks: Jwks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caller(verifier, signed()).role == "credits_user"
    jwks.keys = [{**RSAAlgorithm.to_jwk(OTHER.public_key(), as_dict=True), "kid": "new"}]
    new = b"Bearer " + signed(OTHER, header={"kid": "new"}).encode()
    assert refused(verifier, new)[0] == 401
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert asyncio.run(verifier.caller(asked(new))).role == "credits_user"
    assert refused(verifier, b"Bearer " + signed().encode())[0] == 401  # the old one is withdrawn


@pytest.mark.parametrize("fault", ["500", "redirect", "no JSON", "no keys", "gone"])
def test_an_issuer_that_is_down_is_not_the_callers_fault(verifier: auth.Verifier, jwks: Jwks, fault: str) -> None:
    match fault:
        case "500":
            jwks.status = 500
        case "redirect":
            jwks.status = 302
        case "no JSON":
            jwks.text = "<html>"
        case "no keys":
            jwks.keys = []
        case "gone":
            jwks.close()
    began = time.monotonic()
    for _ in range(20):  # it is asked once
        assert refused(verifier, b"Bearer " + signed().encode()) == (503, "PT503")
    assert time.monotonic() - began < 2
    assert jwks.fetches <= 1
    assert caller(verifier, ours()).role == "credits_user"  # others do not suffer


def test_an_issuer_that_hangs_keeps_nobody_elses_users_waiting(jwks: Jwks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hangs:  # takes connections, and never answers
        silent = f"http://127.0.0.1:{hangs.getsockname()[1]}/"
        issuers = {ISSUER: Issuer(jwks.url, ("credits",)), BACKEND: Issuer(silent, ("credits",))}
        verifier = auth.Verifier(Settings(jwt_issuers=issuers))

        async def ask(issuer: str) -> float:
            began = time.monotonic()
            with suppress(Refused):
                await verifier.caller(asked(f"Bearer {signed(iss=issuer)}".encode()))
            return time.monotonic() - began

        async def main() -> tuple[float, list[float]]:
            others = [asyncio.create_task(ask(BACKEND)) for _ in range(20)]
            await asyncio.sleep(0.2)
            return await ask(ISSUER), await asyncio.gather(*others)

        ours, theirs = asyncio.run(main())
        assert ours < 1
        assert max(theirs) > 2


def test_known_keys_outlast_an_outage(verifier: auth.Verifier, jwks: Jwks) -> None:
    assert caller(verifier, signed()).role == "credits_user"
    jwks.status = 500
    assert caller(verifier, signed()).role == "credits_user"


def test_published_secrets_are_no_keys(verifier: auth.Verifier, jwks: Jwks) -> None:
    jwks.keys = [JWK, {"kty": "oct", "kid": "sym", "k": b64(SECRET), "use": "sig"}]
    for algorithm in ("HS256", "RS256"):
        token = forged({"alg": algorithm, "kid": "sym"}, SECRET.encode())
        assert refused(verifier, f"Bearer {token}".encode()) == (401, "PGRST301")


def test_without_keys_nobody_is_believed() -> None:
    nobody = auth.Verifier(Settings())
    for token in (ours(), forged({"alg": "HS256"}, b"\0"), signed()):
        assert refused(nobody, f"Bearer {token}".encode()) == (500, "PGRST300")
    only_users = auth.Verifier(Settings(jwt_issuers={ISSUER: Issuer("http://127.0.0.1:1/")}))
    for token in (ours(), forged({"alg": "HS256"}, b"\0", claims(iss=None))):
        assert refused(only_users, f"Bearer {token}".encode()) == (401, "PGRST301")


def test_a_weak_secret_is_refused_at_the_start() -> None:
    for secret in ("secret", "x" * 31):
        with pytest.raises(SettingsError, match="PGCREDITS_JWT_SECRET"):
            auth.Verifier(Settings(jwt_secret=secret))
    auth.Verifier(Settings(jwt_secret="ä" * 16))


def test_settings_are_understood_or_refused() -> None:
    def read(issuers: str, **more: str) -> Settings:
        return Settings.from_environment({"PGCREDITS_JWT_ISSUERS": issuers, **more})

    short = read('{"https://a": "https://a/keys"}', PGCREDITS_JWT_AUDIENCE="credits, other")
    assert short.jwt_issuers == {"https://a": Issuer("https://a/keys", ("credits", "other"))}
    long = read('{"a": {"jwks": "http://localhost:1/k", "audience": null, "service": true}}').jwt_issuers
    assert long == {"a": Issuer("http://localhost:1/k", (), service=True)}
    assert read("").jwt_issuers == {}
    for wrong in (
        "x", "[]", "5", '{"a": 5}', '{"a": {}}', '{"a": "https://a/k"}',
        '{"a": {"jwks": "http://a/k", "audience": "c"}}',
        '{"a": {"jwks": "file:///etc/passwd", "audience": "c"}}', '{"a": {"jwks": "https://a", "audience": 5}}',
        '{"a": {"jwks": "https://a", "audience": "c", "service": "yes"}}', '{"a": {"jwks": "https://a", "aud": "c"}}',
    ):  # fmt: skip
        with pytest.raises(SettingsError, match="PGCREDITS_JWT_ISSUERS"):
            read(wrong)
