"""What operators look at: figures, checks, reports, settings, events, a restored dump; what the door says of itself."""

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from client import CreditsError
from commands import pgcredits
from door import Door
from ledger_support import DAY, HOUR, MINUTE, Ledger, assert_sound, committed, refused, session
from prometheus_client.parser import text_string_to_metric_families
from psycopg import Connection
from servers import ONE_ENGINE, Database
from stripe_world import World, prepare, settle

from pgcredits import observe
from pgcredits.settings import Settings, SettingsError

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "token-of-the-scraper"


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.change("update credits.jobs set next_run_at = '2100-01-01'")  # the clock is turned, and nobody runs them
    return ledger


def figures(ledger: Ledger) -> dict[tuple[str, ...], Any]:
    """Values of metrics() by name, without the prefix, and labels."""
    return {
        (row.name.removeprefix("pgcredits_"), *row.labels.values()): None if row.value is None else float(row.value)
        for row in ledger.metrics()
    }


def ill(ledger: Ledger) -> dict[str, str]:
    """Checks that are not ok."""
    return {row.name: row.status for row in ledger.health() if row.status != "ok"}


def test_figures_and_checks_follow_what_happens(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    assert ill(ledger) == {}
    assert figures(ledger)[("audit_violations",)] is None
    ledger.change("update credits.jobs set next_run_at = credits.now() - interval '1 hour' where name = 'audit'")
    assert ill(ledger) == {"jobs_run": "warn"}
    ledger.change("update credits.jobs set next_run_at = '2100-01-01'")

    ledger.open("alpha", 100)
    ledger.reserve("alpha", 30, "r", ttl=DAY)
    ledger.refresh_totals()
    found = figures(ledger)
    assert [found[name] for name in (("accounts", "active"), ("credits_balance",), ("credits_held",))] == [1, 100, 30]
    assert [found[name] for name in (("credits_unspent", "bonus"), ("reservations_open",), ("credits_debt",))] == [
        100,
        1,
        0,
    ]

    ledger.tell(
        "customer.subscription.updated", {"id": "sub_1", "object": "subscription", "customer": "cus_9"}, "evt_p"
    )
    ledger.tell("checkout.session.completed", session(currency="eur"), "evt_1")
    found = figures(ledger)
    assert found["stripe_events_waiting", "parked"] + found["stripe_events_recent", "applied"] >= 1
    assert ill(ledger) == {}
    ledger.now += 70 * MINUTE
    assert ill(ledger) == {"events_are_retried": "fail", "events_wait": "warn", "requests_are_sent": "fail"}
    ledger.now += DAY
    checks = ill(ledger)
    assert (checks["events_wait"], checks["totals_are_counted"]) == ("fail", "warn")
    ledger.set_setting("stripe_event_max_attempts", 1)
    ledger.process_stripe_events()
    assert ill(ledger)["events_given_up"] == "warn"
    assert [row.name for row in ledger.health()][: len(ill(ledger))] == sorted(ill(ledger), key=list(ill(ledger)).index)


def test_checks_of_requests_subscriptions_and_the_audit(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    ledger.open("alpha")
    ledger.row("get_or_create_stripe_customer", user_id="alpha")
    assert ill(ledger) == {}
    ledger.now += 2 * HOUR
    assert ill(ledger) == {"requests_are_sent": "fail"}
    (request,) = ledger.claim_stripe_requests()
    ledger.complete_stripe_request(request.request_id, 401, '{"error": {}}')
    assert ill(ledger)["stripe_takes_our_key"] == "fail"
    ledger.now += HOUR
    (request,) = ledger.claim_stripe_requests()
    ledger.complete_stripe_request(request.request_id, 400, '{"error": {}}')
    assert ill(ledger) == {"requests_succeed": "warn"}
    assert ledger.run_audit() == []
    ledger.now += 3 * DAY
    assert ill(ledger) == {"audit_is_run": "warn"}
    ledger.grant(5)
    ledger.change("update credits.balances set balance = 6 where account_id = 'alpha'")
    assert len(ledger.run_audit()) == figures(ledger)[("audit_violations",)] > 1
    assert ill(ledger) == {"audit_is_clean": "fail"}
    (last, first) = ledger.query("select * from credits.report_integrity order by audit_run_id desc")
    assert (first.sound, last.sound, len(last.sample)) == (True, False, last.findings)
    assert ledger.ready() == []
    ledger.conn.execute("set transaction read only")
    assert ledger.row("ready")[0].startswith("The server takes no writes")


def test_metrics_reads_no_large_table(database: Database) -> None:
    """Ten thousand events, requests and accounts more cost no more pages than indexes have."""
    with database.connect("credits_owner", autocommit=True) as conn:
        many = "from generate_series(1, 10000) n"
        conn.execute(f"insert into credits.accounts (account_id) select 'a' || n {many}")
        conn.execute(f"insert into credits.balances (account_id, hash) select 'a' || n, '' {many}")
        conn.execute(
            "insert into credits.stripe_events (event_id, endpoint, status, received_at, payload) "
            f"select 'evt_' || n, 'default', 'applied', now() - interval '2 days', '{{}}' {many}"
        )
        conn.execute(
            "insert into credits.stripe_requests (purpose, ref, method, path, state, created_at, run_at, finished_at) "
            f"select 'retrieve', 'x' || n, 'get', '/v1/x', 'done', now(), now(), now() {many}"
        )
        conn.execute("analyze")
        read = "select sum(seq_tup_read) as rows from pg_stat_xact_user_tables where schemaname = 'credits'"
        with conn.transaction():
            conn.execute("select * from credits.health()")
            row = conn.execute(read).fetchone()
        assert row
        assert row[0] < 500


def test_reports_answer_for_the_service(ledger: Ledger) -> None:
    world = World()
    prepare(ledger, "alpha", "beta")
    world.refund(world.buy("alpha", customer=world.customer("alpha", named=True)), 300)
    world.subscribe("alpha", "basic")
    ledger.grant(50, "beta", kind="promo", expires_at=world.moment + HOUR)
    ledger.reserve("beta", 20, "r")
    ledger.settle("beta", "r", 15)
    ledger.now = world.moment + DAY
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    settle(ledger, world)
    ledger.book("beta")
    views = ledger.query(
        "select c.relname as name from pg_class c where c.relkind = 'v' and c.relname ~ '^report_' "
        "and c.relnamespace = 'credits'::regnamespace and obj_description(c.oid) ~ '^Every (day|week|month): '"
    )
    answers = {view.name: ledger.query(f"select * from credits.{view.name}") for view in views}
    assert len(answers) == 11
    (sold,) = answers["report_revenue"]
    assert (sold.package, sold.amount, sold.refunded, sold.net) == ("starter", 1000, 300, 700)
    (lost,) = answers["report_breakage"]
    assert (lost.kind, lost.credits) == ("promo", 35)
    owed = {row.kind: row for row in answers["report_liability"]}
    assert (owed["purchase"].currency, owed["plan"].credits) == ("usd", 1000)
    flow = sum(row.credits for row in answers["report_credit_flow"])
    assert flow == sum(ledger.get_balance(account).balance for account in ("alpha", "beta"))
    assert [(row.status, row.charged) for row in answers["report_reservations"]] == [("settled", 15)]
    assert [(row.state, row.plan, row.subscriptions) for row in answers["report_subscriptions"]] == [
        ("active", "basic", 1)
    ]
    assert answers["report_failed_events"] == answers["report_unexpected_moves"] == []


def test_what_a_hold_has_of_a_grant_that_ended_is_still_owed(ledger: Ledger) -> None:
    """It is a part of the balance, and may be charged; reports and figures had lost it."""
    ledger.open("alpha", 10)
    ledger.grant(100, kind="promo", expires_at=ledger.now + HOUR)
    ledger.reserve("alpha", 40, "r", ttl=3 * HOUR)
    for used in (0, 15):
        ledger.now += HOUR
        ledger.capture("alpha", "r", used, key="c") if used else ledger.book()
        counted = {row.label: row.value for row in ledger.rows("refresh_totals") if "unspent" in row.name}
        owed = {row.kind: row.credits for row in ledger.query("select * from credits.report_liability")}
        assert counted == owed == ledger.get_balance("alpha").by_kind == {"bonus": 10, "promo": 40 - used}


def test_what_goes_back_takes_its_share_of_the_tax_with_it(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    ledger.open_account("alpha")
    ledger.tell("checkout.session.completed", session(amount_total=1190, total_details={"amount_tax": 190}))
    goes_back = ((0, 0, 1000), (119, 0, 900), (119, 119, 800), (1190, 0, 0), (0, 1190, 0), (5, 0, 996))
    for refunded, disputed, net in goes_back:
        ledger.change("update credits.purchases set amount_refunded = %s, amount_disputed = %s", refunded, disputed)
        (sold,) = ledger.query("select * from credits.report_revenue")
        assert (sold.amount, sold.tax, sold.net) == (1190, 190, net)
    ledger.change("update credits.purchases set amount_refunded = 0, amount = 0, amount_tax = 0")
    assert ledger.query("select net from credits.report_revenue") == [(0,)]


def test_settings_are_of_their_kind(ledger: Ledger) -> None:
    good = {"past_due_grace": "0 days", "stripe_event_max_attempts": 5, "dispute_freezes": "account",
            "allowed_redirect_urls": ["https://shop.example"], "low_balance_threshold": 5, "expiring_soon_days": 0,
            "operator_email": "ops@example.com", "customer_email": ["refund", "low_balance"],
            "notification_lease": "1 minute", "job_lease": "0 minutes"}  # fmt: skip
    bad: dict[str, list[Any]] = {"stripe_event_max_attempts": ["5", -1, None, 2**31],
           "job_history": ["2000 years", "1"], "dispute_freezes": ["all", ""],
           "allowed_redirect_urls": ["https://shop.example", [1], {}], "low_balance_threshold": ["5", -1, 1e-7],
           "expiring_soon_days": [7.5], "notification_max_attempts": [0], "operator_email": ["ops", "a@x.com, b@x.com"],
           "customer_email": ["low_balance", ["job_failed"], [1], {}, None],
           "notification_lease": ["0 seconds"], "stripe_request_lease": ["30 seconds"],
           "job_max_wait": ["0 seconds"], "stripe_event_max_wait": ["59 seconds"]}  # fmt: skip
    for name, value in good.items():
        assert ledger.set_setting(name, value).value == value
    for name, values in bad.items():
        for value in values:
            with ledger.unchanged(), refused(400, "invalid_request", argument="value"):
                ledger.set_setting(name, value)
    settings = {row.name: row.value for row in ledger.list_settings()}
    assert {name: settings[name] for name in good} == good
    assert ledger.set_setting("low_balance_threshold", None).value is None
    assert ledger.set_setting("customer_email", value=True).value is True  # after a list


def test_sums_of_a_time_to_come_are_not_kept(ledger: Ledger) -> None:
    ledger.open_account("alpha")
    ledger.freeze_account("alpha", reason="x")
    ledger.now += DAY
    assert "frozen" in {row.label for row in ledger.rows("refresh_totals")}
    ledger.now -= DAY  # the clock was wrong
    ledger.unfreeze_account("alpha")
    assert "frozen" not in {row.label for row in ledger.rows("refresh_totals")}


def test_a_setting_at_its_limit_stops_no_job(ledger: Ledger) -> None:
    for row in ledger.list_settings():
        highest: Any = "1000 years" if re.match(r"\d", str(row.value)) else 1_000_000
        if isinstance(row.value, int | str) and not isinstance(row.value, bool):
            with suppress(CreditsError):  # a text that is no duration
                ledger.set_setting(row.name, highest)
    assert {row.name for row in ledger.list_settings() if row.value == "1000 years"} > {"job_history", "job_lease"}
    for job in ledger.list_jobs():
        assert ledger.run_job(job.name).outcome in ("done", "running"), job.name
    assert len(ledger.claim_stripe_requests()) == 1  # of the reconciliation
    assert ledger.claim_notifications() == []
    assert {row.state for row in ledger.list_jobs()} == {"waiting"}


def test_a_text_that_looks_like_a_duration_stays_a_text(ledger: Ledger) -> None:
    for name in ("product_name", "stripe_id_prefix"):
        for value in ("7d", "pgc"):
            assert ledger.set_setting(name, value).value == value


def test_every_check_has_a_runbook_and_a_figure(ledger: Ledger) -> None:
    page = (ROOT / "docs/operations.md").read_text()
    checks = {row.name for row in ledger.health()}
    assert set(re.findall(r"^### `(\w+)`", page, re.MULTILINE)) == checks
    ledger.refresh_totals()
    rules = {row.metric for row in ledger.table("health_checks")}
    assert rules <= {row.name for row in ledger.metrics()}
    assert "update credits." not in page.lower()
    assert "update credits." not in (ROOT / "docs/stripe.md").read_text().lower()


# The door -----------------------------------------------------------------------------------------------------------


def test_what_the_door_counts_and_logs(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pgcredits.access")
    with Door(database.dsn, metrics_token=TOKEN) as door:
        assert door.post(b'{"id": "evt_1", "type": "a.b", "secret": "no-log"}').headers["x-request-id"]
        answer = door.http.get("/webhooks/stripe/none?card=4242", headers={"X-Request-Id": "proxy-7"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (405, "proxy-7")
        named = door.http.get("/none/none", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", named)
        assert [door.http.get(path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 401]
        assert door.http.get("/metrics", headers={"Authorization": "Bearer x"}).status_code == 401
        page = door.http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert page.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    counted = {
        (s.labels["method"], s.labels["route"], s.labels["status"]): s.value
        for s in families["pgcredits_http_request_seconds"].samples
        if s.name.endswith("_count")
    }
    assert counted["POST", "/webhooks/stripe/{endpoint}", "200"] == 1
    assert counted["GET", "/webhooks/stripe/{endpoint}", "405"] == 1
    assert counted["GET", "unknown", "404"] == 1
    assert families["pgcredits_up"].samples[0].value == 1
    with committed(database) as ledger:
        known = {row.name.removesuffix("_total") for row in ledger.metrics() if row.value is not None}
        assert known <= set(families)
        types = {row.name.removesuffix("_total"): row.type for row in ledger.metrics() if row.value is not None}
        assert {name: families[name].type for name in types} == types
    told = [record for record in caplog.records if record.name == "pgcredits.access"]
    assert [record.fields["status"] for record in told] == [200, 405, 404]  # type: ignore[attr-defined]
    assert not re.search("no-log|4242|card|none", caplog.text)


def test_the_door_without_a_token_a_database_or_writes(database: Database) -> None:
    with Door(database.dsn) as door:
        assert door.http.get("/metrics").status_code == 404
        with database.admin() as admin:
            admin.execute(f"alter database {database.name} set default_transaction_read_only = on")
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() "
                "and pid <> pg_backend_pid()"
            )
        answer = door.http.get("/readyz")
        assert (answer.status_code, answer.json()["message"]) == (503, "not_ready")
        assert "takes no writes" in answer.json()["hint"]
    with Door("host=127.0.0.1 port=1 dbname=none", metrics_token=TOKEN, pool_timeout=1) as door:
        page = door.http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    samples = {s.name: s.value for f in text_string_to_metric_families(page.text) for s in f.samples}
    assert (page.status_code, samples["pgcredits_up"]) == (200, 0)
    assert "pgcredits_stripe_stopped" not in samples


def test_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:]
    try:
        observe.configure_logging(Settings(log_format="json"))
        observe.request_id.set("req-1")
        logging.getLogger("a.b").info("two\nlines %s", 1, extra={"fields": {"seconds": 0.5}})
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("a.b").exception("it broke")
    finally:
        logging.root.handlers[:] = before
        observe.request_id.set(None)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["message"], first["request_id"], first["seconds"], first["level"]) == (
        "two\nlines 1",
        "req-1",
        0.5,
        "info",
    )
    assert "ValueError: why" in second["traceback"]
    with pytest.raises(SettingsError, match="PGCREDITS_LOG_FORMAT must be text or json"):
        Settings.from_environment({"PGCREDITS_LOG_FORMAT": "xml"})


# Commands -----------------------------------------------------------------------------------------------------------


@ONE_ENGINE
def test_the_commands_of_an_operator(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    with committed(database) as ledger:
        ledger.load_demo_catalog()
        ledger.open("alpha", 5)
        ledger.tell(
            "checkout.session.completed", session(metadata={"account_id": "beta", "package": "starter"}), "evt_1"
        )
        ledger.tell("unheard.of", {"id": "x"}, "evt_2")
    _, listed, _ = pgcredits(database, capsys, "events", "list", "--status", "parked")
    assert [line.split("\t")[1:] for line in listed.splitlines()] == [
        ["evt_1", "checkout.session.completed", "parked", "account_unknown"]
    ]
    assert json.loads(pgcredits(database, capsys, "events", "show", "evt_1")[1])["waits_for"] == "account:beta"
    replayed = pgcredits(database, capsys, "events", "replay", "evt_1", "evt_2")
    assert replayed == (1, "evt_1\tparked\nevt_2\tignored\n", "")
    code, _, complaint = pgcredits(database, capsys, "events", "show", "evt_3")
    assert (code, complaint.split(" · ")[0]) == (1, "pgcredits: event_not_found")
    changed = pgcredits(database, capsys, "settings", "set", "past_due_grace", "3 days")
    assert changed == (0, 'past_due_grace = "3 days"\n', "")
    assert pgcredits(database, capsys, "settings", "list")[1].count("\n    ") > 5
    assert pgcredits(database, capsys, "audit")[0] == 0
    with committed(database) as ledger:
        ledger.spend("alpha", 1, key="by m1", member_id="m1")
    assert pgcredits(database, capsys, "erase-member", "alpha", "m1", "--yes") == (
        0,
        "Erased. 1 rows told of m1.\n",
        "",
    )
    restored = pgcredits(database, capsys, "resume-after-restore")
    assert (restored[0], restored[1].split(" ", 1)[0]) == (0, "0")
    assert pgcredits(database, capsys, "erase", "alpha", "--yes")[1].startswith("Erased. 4 credits were forfeited;")
    with committed(database) as ledger:
        assert figures(ledger)[("audit_violations",)] == 0


def test_a_restored_dump_audits_clean(database: Database, tmp_path: Path) -> None:
    with committed(database) as ledger:
        ledger.load_demo_catalog()
        ledger.open("alpha", 100, 50)
        ledger.reserve("alpha", 30, "r")
        ledger.capture("alpha", "r", 10, key="c")
        ledger.use(7)
        ledger.tell("checkout.session.completed", session(), "evt_1")
        ledger.open_account("beta", plan="team")
        before = ledger.snapshot()
    dump = tmp_path / "dump"
    database.program("pg_dump", "--format=custom", f"--file={dump}", f"--dbname={database.admin_dsn}")
    with database.engine.database("template0") as restored:
        database.program("pg_restore", "--exit-on-error", f"--dbname={restored.admin_dsn}", str(dump))
        with committed(restored) as ledger:
            assert ledger.snapshot() == before
            assert_sound(ledger)
            assert ledger.settle("alpha", "r", 5).charged == 5
            assert ledger.receive_stripe_event("default", '{"id": "evt_1"}').outcome == "duplicate"
            assert_sound(ledger)
