"""Settings, all from the environment. `.env.example` says what each is for."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


class SettingsError(Exception):
    """A setting cannot be understood; the text names it."""


@dataclass(frozen=True)
class Issuer:
    """Whose tokens count: the address of its keys, what `aud` must name (empty: any), may it say credits_service."""

    jwks: str
    audience: tuple[str, ...] = ()
    service: bool = False


@dataclass(frozen=True)
class Settings:
    """What the environment asks for."""

    dsn: str = field(default="", repr=False)  # it may hold a password
    role: str = ""
    pool_size: int = 10
    pool_timeout: int = 5
    host: str = "127.0.0.1"
    port: int = 8080
    max_body: int = 1024 * 1024
    body_timeout: float = 10
    data: Path = Path(".pgcredits")
    embedded_port: int = 0
    webhook_secrets: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    stripe_key: str = field(default="", repr=False)
    stripe_api_base: str = ""
    log_format: str = "text"
    metrics_token: str = field(default="", repr=False)
    notify_secrets: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    smtp_url: str = field(default="", repr=False)  # it may hold a password
    mail_from: str = ""
    jobs: bool = False
    cron_dsn: str = field(default="", repr=False)
    stripe_wait: int = 10
    jwt_secret: str = field(default="", repr=False)
    jwt_audience: tuple[str, ...] = ()
    jwt_issuers: Mapping[str, Issuer] = field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()
    statement_timeout: int = 5
    max_rows: int = 1000

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read them. Raises SettingsError."""
        return cls(
            dsn=environment.get("PGCREDITS_DSN", cls.dsn),
            role=environment.get("PGCREDITS_ROLE", cls.role),
            pool_size=_number(environment, "PGCREDITS_POOL_SIZE", cls.pool_size, 1, 1000),
            pool_timeout=_number(environment, "PGCREDITS_POOL_TIMEOUT", cls.pool_timeout, 1, 60),
            host=environment.get("PGCREDITS_HOST", "").strip("[]") or cls.host,
            port=_number(environment, "PGCREDITS_PORT", cls.port, 0, 65535),
            max_body=_number(environment, "PGCREDITS_MAX_BODY", cls.max_body, 1, 2**30),
            body_timeout=_number(environment, "PGCREDITS_BODY_TIMEOUT", int(cls.body_timeout), 1, 600),
            data=Path(environment.get("PGCREDITS_DATA") or cls.data),
            embedded_port=_number(environment, "PGCREDITS_EMBEDDED_PORT", cls.embedded_port, 0, 65535),
            webhook_secrets=_secrets(environment, "STRIPE_WEBHOOK_SECRET"),
            stripe_key=environment.get("STRIPE_SECRET_KEY", cls.stripe_key).strip(),
            stripe_api_base=_address(environment, "STRIPE_API_BASE"),
            log_format=_word(environment, "PGCREDITS_LOG_FORMAT", ("text", "json")),
            metrics_token=environment.get("PGCREDITS_METRICS_TOKEN", cls.metrics_token).strip(),
            notify_secrets=_secrets(environment, "PGCREDITS_NOTIFY_SECRET"),
            smtp_url=_smtp(environment, "PGCREDITS_SMTP_URL", "PGCREDITS_MAIL_FROM"),
            mail_from=environment.get("PGCREDITS_MAIL_FROM", cls.mail_from),
            jobs=_switch(environment, "PGCREDITS_JOBS", default=True),
            cron_dsn=environment.get("PGCREDITS_CRON_DSN", cls.cron_dsn),
            stripe_wait=_number(environment, "PGCREDITS_STRIPE_WAIT", cls.stripe_wait, 0, 60),
            jwt_secret=environment.get("PGCREDITS_JWT_SECRET", cls.jwt_secret),
            jwt_audience=_list(environment, "PGCREDITS_JWT_AUDIENCE"),
            jwt_issuers=_issuers(environment),
            cors_origins=_list(environment, "PGCREDITS_CORS_ORIGINS"),
            statement_timeout=_number(environment, "PGCREDITS_STATEMENT_TIMEOUT", cls.statement_timeout, 1, 600),
            max_rows=_number(environment, "PGCREDITS_MAX_ROWS", cls.max_rows, 1, 100_000),
        )

    def door(self, port: int) -> str:
        """The address of a door that listens on a port."""
        return f"http://[{self.host}]:{port}" if ":" in self.host else f"http://{self.host}:{port}"

    def secrets_of(self, endpoint: str) -> tuple[str, ...]:
        """Webhook secrets that may have signed for an endpoint: its own, or else the general ones."""
        own = re.sub(r"\W", "_", endpoint).upper()
        return self.webhook_secrets.get(own) or self.webhook_secrets.get("", ())

    def notify_secrets_of(self, endpoint: str) -> tuple[str, ...]:
        """Secrets that sign what is sent to an endpoint: its own, or else the general ones."""
        return self.notify_secrets.get(endpoint.upper()) or self.notify_secrets.get("", ())


def _secrets(environment: Mapping[str, str], prefix: str) -> dict[str, tuple[str, ...]]:
    """Secrets by what follows the prefix in their variable's name; one variable may hold several."""
    return {
        name.removeprefix(prefix).removeprefix("_"): secrets
        for name, value in environment.items()
        if re.fullmatch(rf"{prefix}(_\w+)?", name)
        and (secrets := tuple(one.strip() for one in value.split(",") if one.strip()))
    }


def _smtp(environment: Mapping[str, str], name: str, sender: str) -> str:
    text = environment.get(name, "").strip()
    if text and not re.fullmatch(r"smtps?://([^\s/?#@]+@)?[^\s/?#@:]+(:[0-9]{1,5})?/?", text):
        raise SettingsError(f"{name} must be an address such as smtp://user:password@mail.example.com:587")
    if text and "@" not in environment.get(sender, ""):
        raise SettingsError(f"{name} needs {sender}, the address that e-mails come from")
    return text


def _address(environment: Mapping[str, str], name: str) -> str:
    text = environment.get(name, "").rstrip("/")
    if text and not re.fullmatch(r"https?://[^\s/?#@]+", text):
        raise SettingsError(f"{name} must be an address such as http://127.0.0.1:12111, not {text!r}")
    return text


def _word(environment: Mapping[str, str], name: str, words: tuple[str, ...]) -> str:
    text = environment.get(name) or words[0]
    if text not in words:
        raise SettingsError(f"{name} must be {' or '.join(words)}, not {text!r}")
    return text


def _switch(environment: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = environment.get(name) or ("off", "on")[default]
    if text not in {"on", "off"}:
        raise SettingsError(f"{name} must be on or off, not {text!r}")
    return text == "on"


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise SettingsError(f"{name} must be a number from {least} to {most}, not {text!r}")
    return int(text)


def _list(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in environment.get(name, "").split(",") if one.strip())


def _issuers(environment: Mapping[str, str]) -> dict[str, Issuer]:
    """{"issuer": "address of its JWKS"}, or of an object with jwks, audience and service."""
    try:
        given = json.loads(environment.get("PGCREDITS_JWT_ISSUERS") or "{}")
        return {
            name: _issuer(environment, {"jwks": one} if isinstance(one, str) else one) for name, one in given.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise SettingsError(
            'PGCREDITS_JWT_ISSUERS must be JSON such as {"https://id.example.com": {"jwks": "https://id.example.com/keys",'
            f' "audience": "credits", "service": false}}}}: {error}'
        ) from error


def _issuer(environment: Mapping[str, str], given: dict[str, Any]) -> Issuer:
    if unknown := given.keys() - {"jwks", "audience", "service"}:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    if not re.fullmatch(r"https://[^\s#]+|http://(127\.0\.0\.1|localhost|\[::1\])[:/][^\s#]*", given["jwks"]):
        raise ValueError(f"jwks must be an https address, not {given['jwks']!r}")
    audience = given.get("audience", _list(environment, "PGCREDITS_JWT_AUDIENCE"))
    if "audience" not in given and not audience:
        raise ValueError("audience is missing; null accepts tokens for anybody")
    service = given.get("service", False)
    if not isinstance(service, bool):
        raise TypeError("service must be true or false")
    return Issuer(given["jwks"], (audience,) if isinstance(audience, str) else tuple(audience or ()), service)
