"""Who is not linked to an account learns nothing of it: claims of every kind, every call for others, every right."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from api_support import ISSUER, TOKEN, Browser, furnish
from client import Client, CreditsError
from ledger_support import NOON, Ledger, committed, refused
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import ONE_ENGINE, Database
from test_bad_input import GOOD

URL = "http://localhost"
CALLS: dict[str, dict[str, Any]] = {
    "get_balance": {},
    "history": {},
    "list_reservations": {},
    "prove_balance": {},
    "list_members": {},
    "get_subscription_state": {},
    "get_limits": {"member_id": "m1"},
    "get_usage": {},
    "quote": {"capability": "chapter", "units": 10},
    "check_access": {"capability": "chapter", "units": 10, "member_id": "m1"},
    "list_purchases": {},
    "create_checkout": {"package": "starter", "success_url": URL, "key": "k2"},
    "get_checkout": {"key": "k1"},
    "create_portal_session": {"return_url": URL, "key": "k1"},
    "get_portal_session": {"key": "k1"},
}
CATALOGUE = {"list_packages", "list_plans"}  # of all accounts, for everybody who is signed in
FOR_ALL = {"packages", "plans"}
HOUR = 3600
NOW = NOON.timestamp()

NOBODY: dict[str, Any] = {
    "no claims": "",
    "empty claims": {},
    "claims that are no object": [],
    "a word": '"credits"',
    "anonymous by PostgREST": {"role": "credits_user"},
    "no subject": {**TOKEN, "sub": None},
    "an empty subject": {**TOKEN, "sub": ""},
    "a subject that is no text": {**TOKEN, "sub": ["user-alpha"]},
    "another issuer": {**TOKEN, "iss": "https://other.example"},
    "nearly the issuer": {**TOKEN, "iss": f"{ISSUER}/"},
    "no issuer": {key: value for key, value in TOKEN.items() if key != "iss"},
    "a list of issuers": {**TOKEN, "iss": [ISSUER]},
    "for another audience": {**TOKEN, "aud": "elsewhere"},
    "for others": {**TOKEN, "aud": ["elsewhere", "nowhere"]},
    "for nobody": {**TOKEN, "aud": []},
    "an audience as a key": {**TOKEN, "aud": {"credits": True}},
    "no audience": {key: value for key, value in TOKEN.items() if key != "aud"},
    "expired": {**TOKEN, "exp": NOW - HOUR},
    "never expires": {key: value for key, value in TOKEN.items() if key != "exp"},
    "expires in words": {**TOKEN, "exp": "tomorrow"},
    "expires in a list": {**TOKEN, "exp": [NOW + HOUR]},
    "anonymous": {**TOKEN, "is_anonymous": True},
    "anonymous in words": {**TOKEN, "is_anonymous": "true"},
}
STRANGERS: dict[str, Any] = {  # signed in, and linked to nothing
    "somebody else": {**TOKEN, "sub": "user-gamma"},
    "an account's name": {**TOKEN, "sub": "alpha"},
    "nearly the subject": {**TOKEN, "sub": "user-alpha "},
    "an organisation's name": {**TOKEN, "sub": "org-alpha"},
    "a user's name as an organisation": {**TOKEN, "sub": "user-gamma", "o": {"id": "user-alpha"}},
    "a claim that nobody asks for": {**TOKEN, "sub": "user-gamma", "account_id": "alpha", "org_id": "org-alpha"},
}


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    furnish(ledger)
    ledger.get_or_create_stripe_customer("alpha")
    ledger.link_identity("alpha", ISSUER, "org-alpha", kind="org")
    return ledger


def names(conn: Connection[Any], kind: str) -> set[str]:
    """The functions, or the views, of credits_api."""
    queries = {
        "functions": "select proname from pg_proc where pronamespace = 'credits_api'::regnamespace",
        "views": "select relname from pg_class where relnamespace = 'credits_api'::regnamespace and relkind <> 'c'",
    }
    return {name for (name,) in conn.execute(queries[kind])}


def answer(browser: Browser, function: str, **arguments: Any) -> tuple[Any, ...]:
    """All that an error tells."""
    with pytest.raises(CreditsError) as caught:
        browser.rows(function, **arguments)
    error = caught.value
    return error.status, error.code, json.dumps(error.detail), error.hint


def test_every_call_and_view_is_swept(conn: Connection[Any]) -> None:
    assert names(conn, "functions") == set(CALLS) | CATALOGUE
    assert names(conn, "views") > FOR_ALL


def test_a_call_for_the_account_of_somebody_else_tells_nothing(ledger: Ledger) -> None:
    browser = Browser(ledger.conn)
    for function, arguments in CALLS.items():  # all of them work
        assert isinstance(browser.rows(function, **arguments, account_id="alpha"), list)
    with ledger.unchanged():
        for function, arguments in CALLS.items():
            there = answer(browser, function, **arguments, account_id="beta")
            absent = answer(browser, function, **arguments, account_id="beth")
            assert there[:2] == (404, "account_not_found"), function
            assert [str(word).replace("beth", "beta") for word in absent] == [str(word) for word in there], function
            for odd in ("", "BETA", "beta ", "alpha,beta", "%", "b" * 10_000):
                assert answer(browser, function, **arguments, account_id=odd)[:2] == (404, "account_not_found")
        for view in names(ledger.conn, "views") - FOR_ALL:
            rows = browser.view(view)
            assert {row.account_id for row in rows} == {"alpha"}, view
            assert browser.view(view, "account_id = 'beta'") == [], view
            assert browser.query(f"select count(*) as n from credits_api.{view} v where v.account_id <> 'alpha'") == [
                (0,)
            ]


def test_who_is_not_linked_learns_nothing(ledger: Ledger) -> None:
    with ledger.unchanged():
        for who, claims in {**NOBODY, **STRANGERS}.items():
            signed_in = who in STRANGERS
            browser = Browser(ledger.conn, claims)
            expected = (404, "account_not_found") if signed_in else (401, "not_authenticated")
            for function, arguments in CALLS.items():
                assert answer(browser, function, **arguments)[:2] == expected, (who, function)
            assert answer(browser, "get_balance", account_id="alpha")[:2] == expected, who
            for view in names(ledger.conn, "views"):
                assert bool(browser.view(view)) == (signed_in and view in FOR_ALL), (who, view)
            for function in CATALOGUE:
                if signed_in:
                    assert browser.rows(function), (who, function)
                else:
                    assert answer(browser, function)[:2] == expected, (who, function)


def test_tokens_that_count(ledger: Ledger) -> None:
    def accounts(**changes: Any) -> list[str]:
        return [row.account_id for row in Browser(ledger.conn, {**TOKEN, **changes}).view("accounts")]

    assert accounts() == accounts(aud=["elsewhere", "credits"]) == accounts(is_anonymous=False) == ["alpha"]
    assert accounts(sub="user-gamma", o={"id": "org-alpha"}) == ["alpha"]
    assert accounts(exp=NOW - 29) == accounts(exp=1e300) == ["alpha"]
    ledger.set_issuer(ISSUER, audiences=["credits", "app"], allow_anonymous=True)
    assert accounts(aud="app") == accounts(is_anonymous=True) == ["alpha"]
    assert accounts(sub="user-gamma", o={"id": "org-alpha"}) == []  # the organisation is not asked for any more
    ledger.set_issuer(ISSUER, require_aud=False)
    assert accounts(aud=None) == ["alpha"]
    assert accounts(aud=None, is_anonymous=True) == []
    ledger.set_issuer(ISSUER, audiences=["app"])
    assert accounts() == []


def test_frozen_and_closed_accounts_are_seen_and_buy_nothing(ledger: Ledger) -> None:
    browser = Browser(ledger.conn)
    ledger.set_status("closed", "alpha")
    assert browser.row("get_balance").status == "closed"
    with refused(423, "account_closed"):
        browser.row("create_checkout", package="starter", success_url=URL, key="k3")


# Rights --------------------------------------------------------------------------------------------------------------


def test_who_may_call_what(owner: Connection[Any]) -> None:
    rows = owner.execute(
        """
        select n.nspname, p.proname, coalesce(r.rolname, 'public')
          from pg_proc p
          join pg_namespace n on n.oid = p.pronamespace and n.nspname in ('credits', 'credits_api')
         cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
          left join pg_roles r on r.oid = a.grantee
        """
    ).fetchall()
    assert {role for _, _, role in rows} == {"credits_owner", "credits_service", "credits_user"}
    users = {(schema, name) for schema, name, role in rows if role == "credits_user"}
    assert {name for schema, name in users if schema == "credits_api"} == set(CALLS) | CATALOGUE
    assert {name for schema, name in users if schema == "credits" and not name.startswith("_my_")} == set()
    services = {(schema, name) for schema, name, role in rows if role == "credits_service"}
    assert {name for schema, name in services if schema != "credits" or name.startswith("_")} == set()
    assert services > {("credits", verb) for verb in ("spend", "reserve", "link_identity")}
    for role, allowed in {"public": [], "credits_user": ["credits_api"], "credits_service": ["credits"]}.items():
        schemas = "select s.name from unnest(array['credits', 'credits_api']) s (name)"
        found = owner.execute(f"{schemas} where has_schema_privilege(%s, s.name, 'usage')".encode(), [role]).fetchall()
        assert found == [(name,) for name in allowed], role


def test_end_users_cannot_name_what_their_views_stand_on(ledger: Ledger) -> None:
    browser = Browser(ledger.conn)
    for forbidden in (
        "select * from credits.entries",
        "select account_id from credits.accounts",
        "select * from credits._my_balance('alpha')",
        "select credits._my_accounts()",
        "select * from credits.get_balance('alpha')",
        "select credits.now()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="schema credits"):
            browser.query(forbidden)
    for table, columns in {"entries": "metadata, key", "purchases": "stripe_customer_id", "accounts": "email"}.items():
        for column in columns.split(", "):
            has = "select has_column_privilege('credits_user', %s, %s, 'select')"
            assert ledger.conn.execute(has, [f"credits.{table}", column]).fetchone() == (False,)


def test_nobody_writes_into_tables(ledger: Ledger) -> None:
    writing = "insert, update, delete, truncate, references, trigger"
    rights = """
        select r.role, c.oid::regclass::text
          from pg_class c, unnest(%s::text[]) r (role)
         where c.relnamespace in ('credits'::regnamespace, 'credits_api'::regnamespace)
           and c.relkind in ('r', 'p', 'v', 'S')
           and case c.relkind when 'S' then has_sequence_privilege(r.role, c.oid, 'usage, update')
                              else has_table_privilege(r.role, c.oid, %s)
                                   or has_any_column_privilege(r.role, c.oid, 'insert, update, references') end
    """
    assert ledger.conn.execute(rights, [["public", "credits_service", "credits_user"], writing]).fetchall() == []
    assert ledger.conn.execute(rights, [["credits_owner"], writing]).fetchall()
    for role in ("credits_service", "credits_user"):
        for statement in (
            "update credits.entries set amount = 1 returning 1",
            "delete from credits.entries returning 1",
            "insert into credits.identities values ('i', 'user', 's', 'beta', true, now()) returning 1",
            "update credits_api.accounts set kind = 'user' returning 1",
            "delete from credits_api.history returning 1",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                Browser(ledger.conn, role=role).query(statement)


def test_what_the_owner_makes_is_nobodys(owner: Connection[Any]) -> None:
    owner.execute("create function credits.f() returns int language sql as 'select 1'; create table credits.t ()")
    for role in ("public", "credits_service", "credits_user"):
        may_call = owner.execute("select has_function_privilege(%s, 'credits.f()', 'execute')", [role]).fetchone()
        may_read = owner.execute("select has_table_privilege(%s, 'credits.t', 'select')", [role]).fetchone()
        assert (may_call, may_read) == ((False,), (False,))


def test_timeouts_are_where_postgrest_looks_for_them(shared: Database) -> None:
    with shared.admin() as admin:
        found = admin.execute("select rolname, rolconfig from pg_roles where rolname ~ '^credits_'").fetchall()
    assert {role: sorted(settings or []) for role, settings in found} == {
        "credits_owner": [],
        "credits_forwarder": [],
        "credits_user": ["lock_timeout=4s", "statement_timeout=8s"],
        "credits_service": ["statement_timeout=60s"],
    }


# The attack by pg_temp: types of the attacker's, which a function that runs as its owner takes for the system's ------


def shadow_attack(conn: Connection[Any], calls: list[str]) -> list[str]:
    """The calls that ran code of the attacker, who may make temporary objects and run the calls."""
    conn.execute(
        "create function pg_temp.evil(v pg_catalog.text) returns boolean language plpgsql as "
        "$$ begin raise exception 'PWNED as %', current_user; end $$"
    )
    conn.execute("grant execute on function pg_temp.evil(pg_catalog.text) to public")
    for name in ("text", "uuid", "jsonb", "timestamptz", "date", "bytea"):
        domain = f'create domain pg_temp."{name}" as pg_catalog.text check (pg_temp.evil(value))'
        conn.execute(domain.encode())

    def pwned(call: str) -> bool:
        try:
            conn.execute(call.encode())
        except psycopg.Error as error:
            return "PWNED" in str(error)
        return False

    return [call for call in calls if pwned(call)]


def called(conn: Connection[Any], schema: str, function: str, arguments: dict[str, Any]) -> str:
    """A call with its arguments written out, each as a value whose type is left open."""
    values = {name: json.dumps(value.obj) if isinstance(value, Jsonb) else value for name, value in arguments.items()}
    written = [
        f"{name} => {psycopg.sql.Literal(str(v)).as_string(conn)}" for name, v in values.items() if v is not None
    ]
    return f"select * from {schema}.{function}({', '.join(written)})"


@pytest.fixture
def prepared(database: Database) -> Database:
    with committed(database) as ledger:
        furnish(ledger)
    return database


def test_types_of_the_caller_never_run_as_the_owner(prepared: Database) -> None:
    with prepared.connect("credits_owner", autocommit=True) as owner:
        for name, path in {"weak": "''", "strong": "pg_catalog, pg_temp"}.items():
            owner.execute(
                f"create function credits.{name}() returns int language plpgsql security definer "
                f"set search_path = {path} "
                "as $$ declare v text := 'x'; begin return 1; end $$".encode()
            )
            owner.execute(f"grant execute on function credits.{name} to credits_service".encode())
    weak, strong = "select credits.weak()", "select credits.strong()"
    with prepared.connect("credits_user", autocommit=True) as user:
        claims = {**TOKEN, "exp": 4e9}
        user.execute("select set_config('request.jwt.claims', %s, false)", [json.dumps(claims)])
        calls = [called(user, "credits_api", function, arguments) for function, arguments in CALLS.items()]
        calls += [f"select * from credits_api.{name}" for name in names(user, "views")]
        assert user.execute("select available from credits_api.balances").fetchall()
        assert shadow_attack(user, calls) == []
    with prepared.connect("credits_service", autocommit=True) as service:
        verbs = [called(service, "credits", verb, {**arguments}) for verb, arguments in GOOD.items()]
        assert shadow_attack(service, [weak, strong, *verbs]) == [weak]


# Plans ---------------------------------------------------------------------------------------------------------------


@ONE_ENGINE  # one engine is enough for so many rows
def test_a_page_of_one_account_among_many_rows_is_read_by_an_index(prepared: Database) -> None:
    with prepared.connect("credits_owner") as owner:
        owner.execute(
            """
            insert into credits.entries (entry_seq, created_at, account_id, kind, operation, amount, balance_after,
                                         available_after, hash)
            select n / 1000 + 10, now(), case n % 1000 when 0 then 'alpha' else 'account-' || n % 1000 end,
                   'spend', 'spend', -1, 0, 0, ''
              from generate_series(1, 1000000) n
            """
        )
        owner.execute("analyze credits.entries")
    with prepared.connect() as conn:
        browser = Browser(conn)
        for rest in (
            "order by v.entry_seq desc limit 50",
            "where v.account_id = 'alpha' and v.entry_seq < 100 order by v.entry_seq desc limit 50",
            "where v.account_id = 'beta'",
        ):
            (((plan,),),) = browser.query(f"explain (analyze, format json) select * from credits_api.history v {rest}")
            scans = [node for node in nodes(plan["Plan"]) if node.get("Relation Name") == "entries"]
            assert scans
            for scan in scans:
                assert scan["Node Type"] != "Seq Scan", plan
                assert scan.get("Rows Removed by Filter", 0) == 0, plan


def test_a_view_filtered_by_account_asks_for_that_account_alone(ledger: Ledger) -> None:
    for number in range(9):
        ledger.link_identity(ledger.open(f"more-{number}"), ISSUER, "user-alpha")
    browser = Browser(ledger.conn)
    for view in ("balances", "grants", "subscriptions", "members"):
        query = f"select * from credits_api.{view} v where v.account_id = 'alpha'"
        assert {row.account_id for row in browser.query(query)} == {"alpha"}
        (((plan,),),) = browser.query(f"explain (analyze, format json) {query}")
        calls = [node["Actual Loops"] for node in nodes(plan["Plan"]) if node["Node Type"] == "Function Scan"]
        assert calls == [1, 1], view


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A node of a plan and all below it."""
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


def test_the_backend_has_no_account_of_its_own_in_the_browsers_schema(client: Client) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        client.conn.execute("select * from credits_api.balances")
