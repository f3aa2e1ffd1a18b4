"""The proof: the chain of hashes recomputed outside the database, and every tampering found and named."""

import hashlib
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from ledger_support import DAY, HOUR, NOON, Ledger, assert_sound, session, told, undone
from psycopg import Connection

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def busy(ledger: Ledger) -> None:
    """Four accounts with entries of every kind, an open reservation, a debt, a refund that failed, and usages."""
    ledger.rows("load_demo_catalog")
    ledger.open("alpha", 100, "0.000001")
    ledger.open("beta", 20)
    ledger.grant(30, expires_at=NOON + HOUR)
    ledger.spend("alpha", "12.5", key="k|1 ключ 🙂")
    ledger.spend_many([{"account_id": "alpha", "amount": n, "key": f"m{n}", "subject": "job:1"} for n in range(1, 5)])
    ledger.refund_spend("alpha", "m4", amount=2, key="f")
    ledger.transfer_credits("alpha", "beta", 9, key="t")
    ledger.adjust("alpha", "-0.5", key="a")
    ledger.reserve("alpha", 20, "r")
    ledger.capture("alpha", "r", 5, key="c")
    ledger.settle("alpha", "r", 18)
    ledger.now += 2 * HOUR + timedelta(microseconds=123450)
    ledger.set_member("alpha", "m1", monthly_limit=100)
    ledger.grant(7, effective_at=ledger.now, priority=99)
    ledger.import_opening_balances(
        [{"key": "1", "account_id": "beta", "amount": 3, "expires_at": "2031-01-31T12:00:00.5Z"}]
    )
    ledger.reserve("alpha", 5, "open", member_id="m1")
    lot = ledger.grant(40, "beta")
    ledger.use(40, "beta")
    ledger.revoke_grant("beta", lot.grant_id, amount=35, key="v")
    ledger.open("cy", 10)
    ledger.set_debt_limit("cy", 50)
    ledger.reserve("cy", 10, "over")
    ledger.settle("cy", "over", 25, on_overage="overflow")
    ledger.grant(30, "cy")
    ledger.receive_stripe_event("default", bought("evt_1", "alpha"))
    ledger.receive_stripe_event("default", bought("evt_2", "cy"))
    ledger.use(400, "cy")
    ledger.receive_stripe_event("default", refund("evt_3", "succeeded"))
    ledger.grant(100, "cy")
    ledger.receive_stripe_event("default", refund("evt_4", "failed"))
    ledger.receive_stripe_event("default", told("evt_5", "customer.subscription.created", SUBSCRIPTION))
    ledger.receive_stripe_event("default", told("evt_6", "invoice.paid", INVOICE))
    top_up(ledger)
    ledger.open_account("di", plan="free")
    for number in range(3):
        ledger.authorize_usage("di", "outline", usage_id=f"u{number}")
    ledger.settle_usage("di", "u1")
    ledger.release("di", "u2")


def top_up(ledger: Ledger) -> None:
    """An account buys by its rule and is credited."""
    ledger.open("ed", 10)
    card = {"default_payment_method": "pm_1"}
    named = {"id": "cus_ed", "object": "customer", "metadata": {"account_id": "ed"}, "invoice_settings": card}
    ledger.receive_stripe_event("default", told("evt_7", "customer.created", named))
    ledger.set_auto_topup("ed", 20, "starter", 1000)
    (asked,) = ledger.table("stripe_requests", "purpose = 'top_up'")
    paid = {"id": "pi_ed", "object": "payment_intent", "status": "succeeded", "amount_received": 1000}
    about = {**paid, "currency": "usd", "customer": "cus_ed", "metadata": asked.params["metadata"]}
    ledger.receive_stripe_event("default", told("evt_8", "payment_intent.succeeded", about))


def bought(event_id: str, account_id: str) -> str:
    """A package is bought, at Stripe."""
    metadata = {"account_id": account_id, "package": "starter"}
    about = session(f"cs_{account_id}", customer=None, payment_intent=f"pi_{account_id}", metadata=metadata)
    return told(event_id, "checkout.session.completed", about)


def refund(event_id: str, status: str) -> str:
    """A purchase is paid back in full, or could not be."""
    return told(event_id, "refund.updated", {
        "id": "re_1", "object": "refund", "payment_intent": "pi_cy", "charge": None, "amount": 1000, "currency": "usd",
        "status": status,
    })  # fmt: skip


SUBSCRIPTION = {
    "id": "sub_1", "object": "subscription", "status": "active", "customer": "cus_1", "metadata": {"account_id": "cy"},
}  # fmt: skip
INVOICE = {
    "id": "in_1", "object": "invoice", "status": "paid", "customer": "cus_1", "subscription": "sub_1", "total": 500,
    "lines": {"data": [{
        "id": "il_1", "amount": 500, "quantity": 1, "subscription": "sub_1",
        "period": {"start": int(NOON.timestamp()), "end": int((NOON + 28 * DAY).timestamp())},
        "price": {"id": "price_1", "recurring": {"interval": "month"}, "metadata": {"credits": "500"}},
    }]},
}  # fmt: skip


@pytest.fixture(scope="module")
def scene(stage: Callable[..., Connection[Any]]) -> Ledger:
    ledger = Ledger(stage())
    busy(ledger)
    return ledger


@pytest.fixture
def ledger(scene: Ledger) -> Iterator[Ledger]:
    with undone(scene):
        yield scene


@pytest.fixture(scope="module")
def broken_into(stage: Callable[..., Connection[Any]]) -> Ledger:
    ledger = Ledger(stage("postgres"))
    busy(ledger)
    assert_sound(ledger)
    return ledger


@pytest.fixture
def intruder(broken_into: Ledger) -> Iterator[Ledger]:
    """A superuser whom no trigger and no foreign key stops."""
    with undone(broken_into):
        broken_into.conn.execute("set local session_replication_role = replica")
        yield broken_into


def text_of(entry: Any) -> str:
    """What the hash of an entry covers, as the manual says."""
    micros = (entry.created_at - EPOCH) // timedelta(microseconds=1)
    numbers = [entry.amount, entry.debt, entry.balance_after, entry.available_after]
    ids = "{" + ",".join(map(str, entry.grant_ids)) + "}"
    parts = "{" + ",".join(format(amount, "f") for amount in entry.grant_amounts) + "}"
    moment = f"{micros // 10**6}.{micros % 10**6:06}"
    reservation_id = entry.reservation_id or ""
    return "|".join([
        str(entry.entry_seq), moment, entry.operation, entry.kind, *[format(number, "f") for number in numbers], ids,
        parts, str(entry.refunds_seq or 0), str(len(reservation_id)), reservation_id, entry.key or "",
    ])  # fmt: skip


def test_the_chain_can_be_recomputed_by_anybody(ledger: Ledger) -> None:
    kinds = set()
    for account_id in ("alpha", "beta", "cy"):
        head = hashlib.sha256(account_id.encode()).digest()
        for entry in ledger.table("entries", "account_id = %s order by entry_seq", account_id):
            head = hashlib.sha256(head + text_of(entry).encode()).digest()
            assert entry.hash == head, entry
            kinds.add(entry.kind)
        proof = ledger.prove_balance(account_id)
        assert (proof.ok, proof.hash, proof.findings) == (True, head.hex(), [])
    assert kinds == {row.kind for row in ledger.table("entry_kinds")}


def test_an_account_without_entries_has_a_head_of_its_own(ledger: Ledger) -> None:
    ledger.open("dee")
    proof = ledger.prove_balance("dee")
    assert (proof.ok, proof.entries, proof.hash) == (True, 0, hashlib.sha256(b"dee").hexdigest())


def test_the_proof_shows_the_sums_that_it_compared(ledger: Ledger) -> None:
    proof, balance = ledger.prove_balance("alpha"), ledger.get_balance("alpha")
    assert (proof.balance, proof.held, proof.debt) == (balance.balance, balance.held, balance.debt)
    assert proof.entries_sum == proof.grants_sum == proof.balance
    assert proof.reservations_sum == proof.held == 5
    assert proof.entries == balance.entry_seq == len(ledger.history("alpha", max_rows=1000))


def test_the_proof_speaks_of_what_is_booked(ledger: Ledger) -> None:
    before = ledger.prove_balance("alpha")
    ledger.now += DAY
    assert ledger.prove_balance("alpha") == before
    assert (before.held, ledger.get_balance("alpha").held) == (5, 0)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu"])
@pytest.mark.parametrize("setting", ["datestyle = 'German'", "intervalstyle = 'iso_8601'", "extra_float_digits = -10"])
def test_the_proof_is_the_same_in_every_session(ledger: Ledger, zone: str, setting: str) -> None:
    ledger.conn.execute("select set_config('timezone', %s, true)", [zone])
    ledger.conn.execute(f"set local {setting}".encode())
    assert_sound(ledger)


def test_the_trial_balance_sums_to_zero_over_every_account_of_the_chart(ledger: Ledger) -> None:
    rows = ledger.query("select * from credits.trial_balance")
    assert sum(row.balance for row in rows) == 0
    books = {row.account: row.balance for row in rows}
    assert set(books) == {side for kind in ledger.table("entry_kinds") for side in (kind.debit, kind.credit)}
    balances = [ledger.get_balance(account_id) for account_id in ("alpha", "beta", "cy", "di", "ed")]
    assert -books["customer_credits"] == sum((row.balance for row in balances), Decimal(0))
    assert books["customer_debt"] == sum((row.debt for row in balances), Decimal(0))


LAST = "entry_seq = (select max(entry_seq) from credits.entries where account_id = 'alpha')"
CHAIN, HEAD = "entries_are_numbered_and_chained", "balance_holds_the_head"
HELD, SUM = "held_is_the_sum_of_open_reservations", "balance_is_the_sum_of_entries"
LOT, LOTS = "grant_is_what_its_entries_say", "grants_sum_to_the_balance"
ACCOUNT = "balance_knows_its_account"
SLICES, TERMS = "reservations_hold_their_slices", "grants_are_what_was_asked_for"


def entry(change: str) -> str:
    """Change one entry."""
    return f"update credits.entries set {change} where account_id = 'alpha' and entry_seq = 5"


def lots(change: str, where: str = "true") -> str:
    """Change grants."""
    return f"update credits.grants set {change} where account_id = 'alpha' and {where}"


def hold(change: str) -> str:
    """Change the open reservation."""
    return f"update credits.reservations set {change} where status = 'open'"


FORGED_GRANT = """
  insert into credits.grants (account_id, kind, status, priority, amount, remaining, effective_at, created_at)
  values ('alpha', 'gift', 'active', 0, 5, 5, now(), now())"""
TWO_PLANS = """
  insert into credits.subscriptions (account_id, subscription_id, source, state, anchor_at, created_at)
  select 'alpha', 'plan-' || n, 'internal', 'active', now(), now() from generate_series(1, 2) n"""
REFUNDED = (
    """update credits.stripe_objects set snapshot = snapshot || '{"status": "succeeded"}' where kind = 'refund'"""
)
TWO_TOP_UPS = """
  drop index credits.top_ups_one_open;
  insert into credits.top_ups (account_id, top_up_id, purchase_id, available, customer_id, payment_method, created_at)
  select 'alpha', n, n, 0, 'cus_1', 'pm_1', now() from generate_series(1, 2) n"""
OFFER = "update credits.offers set flat = 2 where plan = 'free' and capability = 'outline'"
KEY_TWICE = """
  alter table credits.entries drop constraint entries_one_per_key;
  update credits.entries set key = 'm1' where account_id = 'alpha' and key = 'm2'"""

TAMPERINGS: list[tuple[str, str]] = [  # the finding that names it, and what the intruder does
    (CHAIN, entry("amount = amount - 1")),
    (CHAIN, entry("amount = amount - 1, balance_after = balance_after - 1").replace("= 5", ">= 5")),
    (CHAIN, entry("created_at = created_at + interval '1 microsecond'")),
    (CHAIN, entry("key = 'other'")),
    (CHAIN, "update credits.entries set kind = 'adjust' where account_id = 'alpha' and kind = 'spend'"),
    (CHAIN, entry("operation = 'adjust'")),
    (CHAIN, entry("debt = debt + 1")),
    (CHAIN, entry("grant_ids = grant_ids || 1::bigint, grant_amounts = grant_amounts || 0.0")),
    (CHAIN, entry("hash = sha256(hash)")),
    (CHAIN, "delete from credits.entries where account_id = 'alpha' and entry_seq = 1"),
    (CHAIN, "delete from credits.entries where account_id = 'alpha' and entry_seq = 5"),
    (CHAIN, entry("entry_seq = entry_seq + 1000")),
    (HEAD, f"delete from credits.entries where account_id = 'alpha' and {LAST}"),
    (HEAD, "delete from credits.entries where account_id = 'alpha'"),
    (HEAD, "update credits.balances set hash = sha256(hash) where account_id = 'alpha'"),
    (HEAD, "update credits.balances set entry_seq = entry_seq + 1 where account_id = 'alpha'"),
    (SUM, "update credits.balances set balance = balance + 1 where account_id = 'alpha'"),
    (SUM, "update credits.balances set debt = debt + 1 where account_id = 'alpha'"),
    (HELD, "update credits.balances set held = held + 1 where account_id = 'alpha'"),
    (HELD, hold("amount = amount + 1")),
    (HELD, hold("status = 'released', closed_at = now()")),
    (HELD, "delete from credits.reservations where status = 'open'"),
    (LOTS, lots("remaining = remaining + 1, amount = amount + 1")),
    (LOTS, "delete from credits.grants where account_id = 'alpha' and remaining > 0"),
    (LOTS, lots("status = 'pending'", "remaining > 0")),
    (LOTS, FORGED_GRANT),
    (LOT, lots("amount = amount + 1, consumed = consumed + 1")),
    (LOT, lots("consumed = consumed - 1, expired = expired + 1", "consumed > 1")),
    (LOT, lots("owed = owed + 1", "revoked + owed < amount")),
    (LOT, lots("remaining = remaining - 1, held = held + 1", "remaining > 1")),
    (LOT, hold("grant_amounts = array[grant_amounts[1] + 1]")),
    (ACCOUNT, "update credits.accounts set status = 'frozen' where account_id = 'alpha'"),
    (ACCOUNT, lots("scope = '{songs}'")),
    ("member_use_is_what_entries_say", "update credits.members set month_used = month_used - 1"),
    ("member_use_is_what_entries_say", "update credits.members set month_start = month_start - interval '1 month'"),
    ("member_use_is_what_entries_say", hold("member_id = 'm2'")),
    (SLICES, hold("grant_ids = grant_ids || 999999999::bigint, grant_amounts = grant_amounts || 5.0")),
    (SLICES, hold("grant_ids = grant_ids || grant_ids, grant_amounts = grant_amounts || 0.0")),
    (SLICES, hold("grant_amounts = grant_amounts || 1.0, grant_ids = grant_ids || null::bigint")),
    (SLICES, hold("grant_ids = '{}', grant_amounts = '{}'")),
    (TERMS, lots("expires_at = expires_at + interval '1 day'", "expires_at is not null")),
    (TERMS, lots("expires_at = null", "expires_at is not null")),
    (TERMS, lots("expires_at = effective_at + interval '1 year'", "source is null and expires_at is null")),
    (TERMS, lots("expires_at = effective_at + interval '1 year'", "source like 'checkout:%'")),
    (TERMS, lots("kind = 'gift'", "source is null")),
    (TERMS, lots("scope = '{songs}'", "source is null")),
    (TERMS, lots("priority = 1", "fingerprint ? 'priority'")),
    (TERMS, lots("effective_at = effective_at - interval '1 day'", "fingerprint ? 'effective_at'")),
    ("nothing_falls_due_unseen", "update credits.balances set next_due_at = 'infinity' where account_id = 'alpha'"),
]  # fmt: skip

STRAY = "entries_and_reservations_have_an_account"
BOOK_TAMPERINGS: list[tuple[str, str]] = [  # what only audit() sees, since it looks beyond one account
    ("trial_balance_is_zero", entry("amount = 'NaN'")),
    ("entries_are_well_formed", entry("kind = 'theft'")),
    ("entries_are_well_formed", "update credits.entries set fingerprint = null where key is not null"),
    ("grants_are_well_formed", lots("expires_at = effective_at")),
    ("reservations_are_well_formed", hold("closed_at = now()")),
    ("reservations_are_well_formed", "update credits.reservations set uncollected = null where status = 'settled'"),
    (STRAY, "update credits.entries set account_id = 'ghost' where account_id = 'alpha'"),
    (STRAY, "update credits.reservations set account_id = 'ghost' where account_id = 'alpha'"),
    ("accounts_have_a_balance", "delete from credits.balances where account_id = 'alpha'"),
    ("keys_are_used_once", KEY_TWICE),
    ("completed_purchases_have_their_grant", "update credits.purchases set credits = credits + 1"),
    ("completed_purchases_have_their_grant", "delete from credits.stripe_facts"),
    ("facts_have_their_purchase", "delete from credits.purchases"),
    ("payments_have_bought_once", "update credits.purchases set stripe_payment_intent_id = 'pi_1'"),
    ("paid_invoices_have_granted", "delete from credits.stripe_facts where kind = 'invoice'"),
    ("paid_lines_have_their_grant", "update credits.allowances set credits = 501, first_credits = 501"),
    ("paid_lines_have_their_grant", "update credits.allowances set first_credits = 499"),
    ("paid_lines_have_their_grant", "delete from credits.plan_grants"),
    ("subscriptions_are_as_mirrored", "update credits.subscriptions set status = 'past_due' where source = 'stripe'"),
    ("subscriptions_are_as_mirrored", "delete from credits.stripe_objects where kind = 'subscription'"),
    ("one_plan_of_our_own", TWO_PLANS),
    ("one_open_top_up", TWO_TOP_UPS),
    ("top_ups_have_their_grant", "update credits.top_ups set state = 'failed'"),
    ("top_ups_have_their_grant", "update credits.top_ups set payment_intent_id = 'pi_other'"),
    ("top_ups_are_armed", "update credits.balances set topup_below = null where account_id = 'ed'"),
    ("clawbacks_reach_their_target", "update credits.clawbacks set firm = 1, target = 1"),
    ("clawbacks_reach_their_target", "update credits.clawbacks set taken = 1"),
    ("clawbacks_reach_their_target", "update credits.clawbacks set owed = 1"),
    ("usages_are_as_their_reservations", "update credits.usages set counted_credits = 2 where usage_id = 'u1'"),
    ("usages_are_as_their_reservations", "delete from credits.reservations where reservation_id = 'u2'"),
    ("windows_count_their_usages", "update credits.usage_windows set calls = calls + 1"),
    ("windows_count_their_usages", "update credits.usages set status = 'open' where usage_id = 'u2'"),
    ("admissions_are_numbered", "update credits.usage_admissions set number = number + 1 where number = 2"),
    ("offers_are_what_plans_say", OFFER),
    ("subscriptions_are_as_their_history", "update credits.subscriptions set state = 'paused' where source = 'stripe'"),
    ("subscriptions_are_as_their_history", "update credits.subscriptions set state = 'none' where source = 'internal'"),
    ("time_zones_are_known", "update credits.accounts set time_zone = 'Mars/Olympus'"),
    ("clawbacks_reach_their_target", REFUNDED),
    ("clawbacks_reach_their_target", "delete from credits.clawbacks; " + REFUNDED),
]  # fmt: skip


def tamper(intruder: Ledger, statement: str) -> None:
    """Do it, and make sure that something was hit."""
    *preparations, last = statement.split(";")
    for preparation in preparations:
        intruder.conn.execute(preparation.encode())
    assert intruder.conn.execute(last.encode()).rowcount > 0


@pytest.mark.parametrize(("finding", "statement"), TAMPERINGS)
def test_tampering_with_an_account_is_found_by_its_proof_and_by_the_audit(
    intruder: Ledger, finding: str, statement: str
) -> None:
    tamper(intruder, statement)
    assert (finding, "alpha") in {(row.invariant, row.account_id) for row in intruder.audit()}
    proof = intruder.prove_balance("alpha")
    assert not proof.ok
    assert finding in {found["invariant"] for found in proof.findings}
    assert intruder.prove_balance("beta").ok


@pytest.mark.parametrize(("finding", "statement"), BOOK_TAMPERINGS)
def test_tampering_beyond_one_account_is_found_by_the_audit(intruder: Ledger, finding: str, statement: str) -> None:
    tamper(intruder, statement)
    assert finding in {row.invariant for row in intruder.audit()}


@pytest.mark.parametrize(
    "statement",
    [
        "update credits.entries set refunds_seq = 2 where account_id = 'alpha' and kind = 'refund'",
        "update credits.entries set refunds_seq = null where account_id = 'alpha' and kind = 'refund'",
        "update credits.entries set reservation_id = 'other' where account_id = 'alpha' and kind = 'settle'",
        entry("available_after = available_after + 1"),
    ],
)
def test_tampering_with_what_an_entry_refers_to_is_found(intruder: Ledger, statement: str) -> None:
    tamper(intruder, statement)
    assert not intruder.prove_balance("alpha").ok


def test_every_finding_that_the_audit_can_name_is_provoked_here(ledger: Ledger) -> None:
    rows = ledger.query(
        r"select p.prosrc as body from pg_proc p where p.pronamespace = 'credits'::regnamespace "
        r"and p.proname ~ '^_?audit'"
    )
    named = {name for row in rows for name in re.findall(r"select '(\w+)',", row.body)}
    assert named == {finding for finding, _ in TAMPERINGS + BOOK_TAMPERINGS}


def test_a_constraint_stops_what_breaks_a_lot_or_a_balance_at_once(intruder: Ledger) -> None:
    for statement in (
        "update credits.grants set consumed = consumed + 1",
        "update credits.grants set remaining = remaining - 1000, consumed = consumed + 1000",
        "update credits.balances set held = balance + 1",
        "update credits.balances set debt = -1",
        "insert into credits.grants overriding system value select * from credits.grants limit 1",
    ):
        with pytest.raises(psycopg.IntegrityError), intruder.conn.transaction():
            intruder.conn.execute(statement.encode())


def test_the_service_may_neither_read_nor_write_a_table(ledger: Ledger) -> None:
    for table in ("entries", "grants", "balances", "reservations", "accounts", "purchases", "stripe_events"):
        for statement in (f"select from credits.{table}", f"delete from credits.{table}"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), ledger.conn.transaction():
                ledger.conn.execute(statement.encode())


def test_a_time_zone_that_the_server_no_longer_knows_hides_no_other_finding(intruder: Ledger) -> None:
    intruder.conn.execute("update credits.accounts set time_zone = 'Mars/Olympus' where account_id in ('alpha', 'di')")
    assert intruder.prove_balance("alpha").ok
    intruder.conn.execute("update credits.balances set held = held + 1 where account_id = 'alpha'")
    intruder.conn.execute("update credits.usage_windows set calls = calls + 1")
    found = {(row.invariant, row.account_id) for row in intruder.audit()}
    zones = {("time_zones_are_known", "alpha"), ("time_zones_are_known", "di")}
    assert found == {*zones, (HELD, "alpha"), (LOTS, "alpha"), ("windows_count_their_usages", "di")}
