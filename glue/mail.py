"""E-mails, through the mail server that the settings name. SQL wrote their words and says who gets them."""

import smtplib
import ssl
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote, urlsplit

from pgcredits.db import Row
from pgcredits.settings import Settings

PATIENCE = 10.0  # seconds for each word of the mail server


@dataclass(frozen=True)
class Outcome:
    """What became of a delivery: its HTTP or SMTP status, None if there was none, and what was said or went wrong."""

    status: int | None
    answer: str


def mail(settings: Settings, row: Row) -> Outcome:
    """Send an e-mail. Its message id is the same each time, so that a mail server may see that it had it."""
    try:
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = settings.mail_from, row["address"], row["subject"]
        message["Date"] = formatdate()
        message["Message-ID"] = f"<{row['message_id']}.{row['delivery_id']}@{settings.mail_from.rpartition('@')[2]}>"
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(row["body"])
        with _smtp(settings.smtp_url) as server:
            server.send_message(message)
    except smtplib.SMTPRecipientsRefused as error:
        code, said = next(iter(error.recipients.values()))
        return Outcome(code, _text(said))
    except (smtplib.SMTPSenderRefused, smtplib.SMTPDataError) as error:
        return Outcome(error.smtp_code, _text(error.smtp_error))
    except (smtplib.SMTPException, OSError, ValueError) as error:  # of the server, not of this message
        return Outcome(None, f"not sent: {type(error).__name__}")
    return Outcome(250, "accepted")


def _smtp(url: str) -> smtplib.SMTP:
    """A session with the mail server: smtps:// is TLS from the start, smtp:// turns to it but on this machine."""
    address, context = urlsplit(url), ssl.create_default_context()
    host = address.hostname or ""
    if address.scheme == "smtps":
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, address.port or 465, timeout=PATIENCE, context=context)
    else:
        server = smtplib.SMTP(host, address.port or 587, timeout=PATIENCE)
        if not _is_local(host):
            server.starttls(context=context)
    if address.username:
        server.login(unquote(address.username), unquote(address.password or ""))
    return server


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(said: Any) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)
