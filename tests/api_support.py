"""What the tests of credits_api share: tokens, and somebody who calls with one."""

import json
from typing import Any

from ledger_support import NOON, Ledger, session
from psycopg import Connection, sql
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb

from pgcredits.client import ours

ISSUER = "https://issuer.example"
TOKEN: dict[str, Any] = {"iss": ISSUER, "aud": "credits", "sub": "user-alpha", "exp": NOON.timestamp() + 3600}
CATALOG = {
    "capabilities": {"chapter": {"name": "Chapter", "unit": "words"}},
    "plans": {"team": {"name": "Team", "capabilities": {"chapter": {"limits": [{"calls": 9, "per": "day"}]}}}},
    "packages": {"starter": {"name": "Starter", "credits": 1000, "price": 1000, "currency": "usd"}},
    "rates": [{"capability": "chapter", "price": {"credits": 1, "block": 10}}],
}


class Browser:
    """Calls of an end user, made in savepoints of a connection that may act as credits_user."""

    def __init__(self, conn: Connection[Any], claims: Any = TOKEN, role: str = "credits_user") -> None:
        self.conn = conn
        self.claims = claims
        self.role = role

    def query(self, text: str | sql.Composed, *parameters: Any) -> list[Any]:
        """Rows of a query, as this user, with these claims and no more than the role of an end user."""
        before = self.conn.execute("select current_user").fetchone()
        assert before
        claims = self.claims if isinstance(self.claims, str) else json.dumps(self.claims)
        with ours(), self.conn.transaction(), self.conn.cursor(row_factory=namedtuple_row) as cursor:
            cursor.execute("select set_config('request.jwt.claims', %s, true)", [claims])
            cursor.execute(sql.SQL("set local role {}").format(sql.Identifier(self.role)))
            rows = cursor.execute(text.encode() if isinstance(text, str) else text, parameters).fetchall()
            cursor.execute(sql.SQL("set local role {}").format(sql.Identifier(before[0])))
            return rows

    def rows(self, function: str, **arguments: Any) -> list[Any]:
        """What a function of credits_api answers."""
        named = [sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder()) for name in arguments]
        call = sql.SQL("select * from credits_api.{}({})").format(sql.Identifier(function), sql.SQL(", ").join(named))
        return self.query(call, *arguments.values())

    def row(self, function: str, **arguments: Any) -> Any:
        (row,) = self.rows(function, **arguments)
        return row

    def view(self, name: str, where: str = "true", *parameters: Any) -> list[Any]:
        """Rows of a view of credits_api."""
        return self.query(f"select * from credits_api.{name} v where {where}", *parameters)


def furnish(ledger: Ledger) -> None:
    """Two accounts with something of everything, each linked to a user of one issuer."""
    ledger.rows("apply_catalog", catalog=Jsonb(CATALOG))
    ledger.set_issuer(ISSUER, audiences=["credits"], org_claim=["o", "id"])
    for number, name in enumerate(("alpha", "beta"), 1):
        ledger.open_account(name, plan="team")
        ledger.grant(100 * number, name, description="Welcome")
        ledger.use(number, name, subject="book:1", metadata=Jsonb({"margin": 5}))
        ledger.reserve(name, 10, "r1")
        ledger.set_member(name, "m1", monthly_limit=50)
        bought = {"account_id": name, "package": "starter"}
        event = session(f"cs_{name}", customer=f"cus_{name}", payment_intent=f"pi_{name}", metadata=bought)
        assert ledger.tell("checkout.session.completed", event) == "applied"
        ledger.create_checkout(name, package="starter", success_url="http://localhost", key="k1")
        ledger.link_identity(name, ISSUER, f"user-{name}")
