"""credits_api: what the bearer of a token sees and may do, and that its first version only grows."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from api_support import ISSUER, TOKEN, Browser, furnish
from client import CreditsError
from ledger_support import DAY, HOUR, NOON, Ledger, refused, together
from psycopg import Connection
from servers import Database

CONTRACT = Path(__file__).with_name("contract_v1.txt")


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    furnish(ledger)
    return ledger


@pytest.fixture
def browser(ledger: Ledger) -> Browser:
    return Browser(ledger.conn)


def test_a_token_sees_its_account(ledger: Ledger, browser: Browser) -> None:
    balance = browser.row("get_balance")
    assert (balance.account_id, balance.available, balance.held, balance.balance) == ("alpha", 1089, 10, 1099)
    assert browser.view("balances") == [balance] == browser.rows("get_balance", account_id="alpha")
    assert browser.row("get_balance", account_id=None) == balance

    shown = browser.rows("history")
    assert [row.entry_seq for row in shown] == [3, 2, 1]
    assert sorted(browser.view("history")) == sorted(shown)
    assert [row.entry_seq for row in browser.rows("history", before_seq=3, max_rows=1)] == [2]
    assert [row.amount for row in browser.rows("history", kinds=["spend"])] == [-1]
    assert {"key", "metadata", "fingerprint", "hash"}.isdisjoint(shown[0]._fields)

    assert sorted((row.kind, row.remaining, row.held, row.description) for row in browser.view("grants")) == [
        ("bonus", 89, 10, "Welcome"), ("purchase", 1000, 0, "Starter"),
    ]  # fmt: skip
    assert [row.reservation_id for row in browser.rows("list_reservations")] == ["r1"]
    assert browser.rows("list_reservations") == browser.view("reservations")
    assert [(row.package, row.status) for row in browser.rows("list_purchases", status="completed")] == [
        ("starter", "completed")
    ]
    assert sorted(browser.view("purchases")) == sorted(browser.rows("list_purchases", max_rows=None))
    assert browser.view("packages") == browser.rows("list_packages")
    assert browser.view("plans") == browser.rows("list_plans")
    assert [row.code for row in browser.view("plans")] == ["team"]
    assert browser.view("subscriptions") == browser.rows("get_subscription_state")
    assert [(row.member_id, row.monthly_limit) for row in browser.view("members")] == [("m1", 50)]
    assert [row.member_id for row in browser.rows("list_members")] == ["m1"]
    assert browser.row("prove_balance").ok
    assert [row.account_id for row in browser.view("accounts")] == ["alpha"]

    assert browser.row("quote", capability="chapter", units=95).amount == 10
    assert browser.row("check_access", capability="chapter", units=95).allowed
    assert {row.gate for row in browser.rows("get_limits", member_id="m1")} == {"rate_limit", "member_limit"}
    assert ("book:1", 1) in {(row.name, row.credits) for row in browser.rows("get_usage", group_by="subject")}
    assert len(browser.rows("get_usage", group_by=None)) == 1


def test_what_is_shown_is_true_at_this_instant(ledger: Ledger, browser: Browser) -> None:
    ledger.grant(7, expires_at=NOON + HOUR)
    browser.claims = {**TOKEN, "exp": (NOON + 2 * DAY).timestamp()}
    assert browser.row("get_balance").balance == 1106
    ledger.now = NOON + DAY
    assert browser.row("get_balance").balance == 1099  # nobody has booked the expiry
    assert [row.balance for row in browser.view("balances")] == [1099]
    assert 7 not in {row.amount for row in browser.view("grants")}
    assert sum(row.remaining for row in browser.view("grants")) == 1099
    assert browser.rows("list_reservations") == []
    assert [row.status for row in browser.view("reservations")] == ["expired"]


def test_buying_once_per_key(ledger: Ledger, browser: Browser) -> None:
    arguments = {"package": "starter", "success_url": "http://localhost/thanks", "key": "k2"}
    bought = browser.row("create_checkout", **arguments, quantity=None)
    assert (bought.state, bought.replayed) == ("queued", False)
    assert browser.row("create_checkout", **arguments).request_id == bought.request_id
    assert browser.row("get_checkout", key="k2").purchase_id == bought.purchase_id
    (purchase,) = ledger.table("purchases", "purchase_id = %s", bought.purchase_id)
    assert (purchase.account_id, purchase.quantity) == ("alpha", 1)
    with refused(409, "idempotency_conflict"):
        browser.row("create_checkout", **{**arguments, "quantity": 2})
    portal = browser.row("create_portal_session", return_url="http://localhost", key="p1")
    assert portal.state == "queued"
    with refused(400, "invalid_request"):
        browser.row("create_checkout", **arguments, metadata='{"account_id": "beta"}')


def test_organisations_and_several_accounts(ledger: Ledger, browser: Browser) -> None:
    ledger.link_identity("beta", ISSUER, "org-beta", kind="org")
    in_org = {**TOKEN, "sub": "user-gamma", "o": {"id": "org-beta"}}
    member = Browser(ledger.conn, in_org)
    assert member.row("get_balance").account_id == "beta"
    with refused(403, "forbidden", account_id="beta"):  # all members of an organisation look, not all buy
        member.row("create_checkout", package="starter", success_url="http://localhost", key="k9")
    with refused(403, "forbidden"):
        member.row("create_portal_session", return_url="http://localhost", key="k9")
    assert ledger.link_identity("beta", ISSUER, "org-beta", kind="org", may_buy=True).may_buy
    assert member.row("create_checkout", package="starter", success_url="http://localhost", key="k9").state == "queued"

    impostor = Browser(ledger.conn, {**TOKEN, "sub": "org-beta"})  # a user whose id is that of an organisation
    assert impostor.view("accounts") == []
    for claim in ("org-beta", {"id": ["org-beta"]}, {"id": {"id": "org-beta"}}, {"ID": "org-beta"}):
        assert Browser(ledger.conn, {**in_org, "o": claim}).view("accounts") == []

    ledger.link_identity("beta", ISSUER, "user-alpha", may_buy=False)
    assert sorted(row.account_id for row in browser.view("balances")) == ["alpha", "beta"]
    with refused(400, "invalid_request", argument="account_id"):
        browser.row("get_balance")
    assert browser.row("get_balance", account_id="beta").account_id == "beta"
    with refused(403, "forbidden"):
        browser.row("get_checkout", key="k1", account_id="beta")
    both = Browser(ledger.conn, {**TOKEN, "sub": "user-beta", "o": {"id": "org-beta"}})
    assert both.row("get_balance").account_id == "beta"  # linked twice is still one account

    assert ledger.unlink_identity("alpha", ISSUER, "user-alpha")
    assert not ledger.unlink_identity("alpha", ISSUER, "user-alpha")
    assert [row.account_id for row in browser.view("accounts")] == ["beta"]
    assert {(row.kind, row.subject) for row in ledger.list_identities("beta")} == {
        ("user", "user-alpha"), ("user", "user-beta"), ("org", "org-beta"),
    }  # fmt: skip
    assert ledger.remove_issuer(ISSUER) == 3
    assert ledger.remove_issuer(ISSUER) == 0
    assert browser.view("accounts") == []
    with refused(401, "not_authenticated"):
        browser.row("get_balance")


def test_links_made_at_once_while_the_issuer_goes(database: Database) -> None:
    with database.connect(autocommit=True) as conn:
        ledger = Ledger(conn, at=None)
        ledger.open_account("alpha")
        ledger.set_issuer(ISSUER, audiences=["credits"])
        link = [lambda one: one.link_identity("alpha", ISSUER, "u1")] * 6
        assert len(set(together(database, link))) == 1
        assert len(ledger.list_identities("alpha")) == 1
        answers = together(database, [*link, lambda one: one.remove_issuer(ISSUER)])
        errors = [answer.code for answer in answers if isinstance(answer, CreditsError)]
        assert set(errors) <= {"issuer_not_found"}
        assert ledger.list_identities("alpha") == []


def catalogue(conn: Connection[Any]) -> list[str]:
    """All that credits_api offers, a line each."""
    found = conn.execute(
        """
        with types as (
          select distinct p.prorettype as oid from pg_proc p where p.pronamespace = 'credits_api'::regnamespace
        )
        select format('function %s(%s) returns %s %s', p.proname, pg_get_function_arguments(p.oid),
                      pg_get_function_result(p.oid), case p.provolatile when 'v' then 'volatile' else 'stable' end)
          from pg_proc p where p.pronamespace = 'credits_api'::regnamespace
        union all
        select format('%s %s(%s)', case c.relkind when 'v' then 'view' else 'type' end, c.relname,
                      string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' order by a.attnum))
          from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         where c.relnamespace = 'credits_api'::regnamespace and c.relkind = 'v'
            or c.relkind = 'c' and c.reltype in (select t.oid from types t)
         group by c.oid, c.relkind, c.relname
        """
    )
    return sorted(line for (line,) in found)


def grown(promised: str, now: str) -> bool:
    """Whether a line of the catalogue keeps a line of the contract: the same, or with more at the end of its list."""
    if promised.startswith("function"):
        name, arguments, result = *promised.split(")", maxsplit=1)[0].split("(", 1), promised.split(")", 1)[1]
        more = now.removeprefix(f"{name}({arguments}").removesuffix(f"){result}")
        added = [argument for argument in more.split(", ") if argument]
        return now == f"{name}({arguments}{more}){result}" and all(" DEFAULT " in argument for argument in added)
    return now == promised or now.startswith(promised.removesuffix(")") + ", ")


def test_the_first_version_is_frozen(owner: Connection[Any]) -> None:
    """What was promised stays. A line that is new or longer is added to the file, which takes nothing away."""
    offered = catalogue(owner)
    promised = CONTRACT.read_text().splitlines()
    for line in promised:
        assert any(grown(line, now) for now in offered), f"promised, and broken: {line}"
    assert offered == promised, "add to tests/contract_v1.txt what is new:\n" + "\n".join(offered)


@pytest.mark.parametrize(
    ("now", "kept"),
    [
        ("function f(a text, b text DEFAULT NULL::text) returns int stable", True),
        ("function f(a text, b text DEFAULT NULL::text, c text DEFAULT NULL::text) returns int stable", True),
        ("function f(a text, b text DEFAULT NULL::text, c text) returns int stable", False),
        ("function f(a text) returns int stable", False),
        ("function f(x text, b text DEFAULT NULL::text) returns int stable", False),
        ("function f(a text, b text DEFAULT NULL::text) returns int volatile", False),
    ],
)
def test_what_counts_as_grown(now: str, kept: bool) -> None:
    assert grown("function f(a text, b text DEFAULT NULL::text) returns int stable", now) is kept
    assert grown("view v(a text, b text)", "view v(a text, b text, c text)")
    assert not grown("view v(a text, b text)", "view v(a text, b integer)")
    assert not grown("view v(a text, b text)", "view v(a text)")


def test_a_token_ends(ledger: Ledger, browser: Browser) -> None:
    ledger.now = NOON + HOUR + timedelta(seconds=29)  # clocks differ a little
    assert browser.row("get_balance").account_id == "alpha"
    ledger.now = NOON + HOUR + timedelta(seconds=30)
    with refused(401, "not_authenticated"):
        browser.row("get_balance")
