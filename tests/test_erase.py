"""Erasure: nothing that tells of a person is left anywhere, the books stay sound, and nobody else loses anything."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ledger_support import DAY, NOON, Ledger, assert_sound, refused, together
from psycopg import Connection
from servers import Database
from stripe_world import World, prepare, settle

SQL = Path(__file__).resolve().parents[1] / "sql"
PERSONAL = "Jane.Doe"


class Telling(World):
    """A world whose objects tell of people, as Stripe's do: of the one who acts when they are first seen."""

    acting = "nobody"

    def show(self, object_id: str, *, expand: bool = False) -> dict[str, Any]:
        shown = super().show(object_id, expand=expand)
        if object_id.split("_", maxsplit=1)[0] in {"prod", "price"}:
            return shown
        who = f"{PERSONAL}@{self.__dict__.setdefault('owners', {}).setdefault(object_id, self.acting)}"
        return shown | {
            "email": who, "name": who, "description": who, "receipt_url": f"https://pay.stripe.example/{who}",
            "customer_details": {"email": who, "address": {"line1": who}}, "billing_details": [{"name": who}],
            "metadata": {**shown.get("metadata", {}), "note": who},
        }  # fmt: skip


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    return Ledger(conn)


def live(ledger: Ledger) -> None:
    """Alpha and beta do the same things, and leave traces of themselves wherever there is a place for it."""
    world = Telling(chatty=True)
    prepare(ledger)
    for account in ("alpha", "beta"):
        who = f"{PERSONAL}@{account}"
        world.acting = account
        ledger.open_account(account, kind="organization", email=who, metadata={"name": who})
        ledger.set_member(account, who, role="admin")
        ledger.grant(50, account, description=who, metadata={"of": who})
        told = {"description": who, "subject": who, "metadata": {"of": who}}
        ledger.spend(account, 5, member_id=who, key="spent", **told)
        ledger.refund_spend(account, "spent", amount=1, reason=who, key="refunded")
        ledger.reserve(account, 5, "r", member_id=who, **told)
        ledger.settle(account, "r", 3, metadata={"of": who})
        ledger.freeze_account(account, reason=who)
        ledger.unfreeze_account(account)
        session = world.buy(account, customer=world.customer(account, named=True))
        world.refund(session, 300)
        subscription = world.subscribe(account, "basic")
        world.renew(subscription)
        world.cancel(subscription)
    ledger.now = world.moment + DAY
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    settle(ledger, world)
    for account in ("alpha", "beta"):
        ledger.get_user_subscription_state(account)
    assert_sound(ledger)


def traces(ledger: Ledger, account_id: str) -> list[str]:
    who = f"{PERSONAL}@{account_id}"
    return [f"{table}: {row}" for table, rows in ledger.snapshot().items() for row in rows if who in row]


def test_a_person_is_gone_and_the_books_are_sound(ledger: Ledger) -> None:
    live(ledger)
    before = {name: [row for row in rows if "beta" in row] for name, rows in ledger.snapshot().items()}
    money = ledger.table("entries", "account_id = 'alpha' order by entry_seq")
    left = ledger.get_balance("alpha")
    assert len(traces(ledger, "alpha")) > 20
    done = ledger.erase_account("alpha")
    assert traces(ledger, "alpha") == []
    assert (done.times, done.forfeited) == (1, left.balance)
    assert min(done.objects, done.events) > 5
    assert_sound(ledger)
    assert ledger.prove_balance("alpha").ok
    kept = [(row.kind, row.amount, row.key, row.hash) for row in money]
    now = ledger.table("entries", "account_id = 'alpha' order by entry_seq")
    assert [(row.kind, row.amount, row.key, row.hash) for row in now][: len(kept)] == kept
    assert {row.kind for row in now[len(kept) :]} == {"revoke"}
    balance = ledger.get_balance("alpha")
    assert (balance.balance, balance.status) == (0, "closed")
    with refused(423, "account_closed"):
        ledger.grant(1, "alpha")
    after = {name: [row for row in rows if "beta" in row] for name, rows in ledger.snapshot().items()}
    assert after == before, "somebody else's"


def test_again_erases_what_came_since_and_takes_nothing_twice(ledger: Ledger) -> None:
    live(ledger)
    first = ledger.erase_account("alpha")
    late = {"id": "cus_alpha", "object": "customer", "email": f"{PERSONAL}@alpha", "deleted": True}
    ledger.now += DAY
    ledger.tell("customer.deleted", late, "evt_late")
    assert traces(ledger, "alpha")
    assert ledger.repeat_erasures() == 1
    assert traces(ledger, "alpha") == []
    again = ledger.erase_account("alpha")
    assert (again.erased_at, again.forfeited, again.times) == (first.erased_at, first.forfeited, 3)
    with ledger.unchanged("erasures"):
        ledger.erase_account("alpha")
    assert_sound(ledger)
    ledger.now += 181 * DAY
    assert ledger.repeat_erasures() == 0


def test_an_account_that_cannot_be_erased_does_not_keep_the_others(ledger: Ledger) -> None:
    for account in ("alpha", "beta", "gamma"):
        ledger.open(account, 10)
        ledger.erase_account(account)
    ledger.change(
        "create function credits.refuse() returns trigger language plpgsql as "
        "$$ begin raise 'not %%', old.account_id; end $$; "
        "create trigger refuse before update on credits.erasures for each row when (old.account_id = 'beta') "
        "execute function credits.refuse()"
    )
    ledger.now += DAY
    assert (ledger.repeat_erasures(), ledger.run_job("repeat_erasures").rows_done) == (2, 2)
    told = ledger.table("notifications", "type = 'erasure_failed'")
    assert [(row.account_id, row.data["error"]) for row in told] == [("beta", "not beta")]


def test_what_no_longer_names_its_customer_is_erased_too(ledger: Ledger) -> None:
    """A card that was detached, and a dispute that names a charge alone."""
    world = Telling(chatty=True)
    world.acting = "alpha"
    prepare(ledger, "alpha")
    session = world.buy("alpha")
    card = world.put("payment_method", "pm_1", "payment_method.attached", customer="cus_alpha", type="card")
    world.wait(hours=1)
    world.put("payment_method", card, "payment_method.updated", customer=None)
    world.close(world.dispute(session, 100, payment_intent=None), "won")
    world.acts[-1].events = [
        replace(event, payload=event.payload.replace("payment_method.updated", "payment_method.detached"))
        for event in world.events
    ]
    tell(ledger, world)
    assert [row for row in traces(ledger, "alpha") if "dispute" in row]
    ledger.erase_account("alpha")
    assert traces(ledger, "alpha") == []
    assert_sound(ledger)


def test_credits_that_come_back_later_are_taken_again(ledger: Ledger) -> None:
    """A dispute that is won, and a refund that fails: the weekly job failed on them, and nobody was erased anew."""
    world = World(chatty=True)
    prepare(ledger, "alpha", "beta")
    disputed, refunded = world.buy("alpha"), world.buy("alpha")
    dispute, refund = world.dispute(disputed, 300), world.refund(refunded, 200)
    tell(ledger, world)
    ledger.erase_account("beta")
    assert ledger.erase_account("alpha").forfeited == 1500
    for late in ("won", "failed", "nothing"):
        world.wait(days=7)
        if late == "won":
            world.close(dispute, "won")
        elif late == "failed":
            world.fail_refund(refund)
        tell(ledger, world)
        assert ledger.repeat_erasures() == 2
        assert ledger.get_balance("alpha").balance == 0
        assert_sound(ledger)
    assert ledger.erase_account("alpha").forfeited == 2000


def test_money_for_a_closed_account_is_seen_until_it_went_back(ledger: Ledger) -> None:
    world = Telling()
    world.acting = "alpha"
    prepare(ledger, "alpha")
    session = world.buy("alpha")
    ledger.erase_account("alpha")
    tell(ledger, world)
    for amount in (300, None):
        assert ledger.repeat_erasures() == 1
        assert traces(ledger, "alpha") == []
        (left,) = ledger.table("stripe_events", "status = 'failed'")
        assert (left.object_id, left.error, left.next_attempt_at) == (session, "PT423 account_closed", None)
        assert {row.name: row.status for row in ledger.health()}["events_given_up"] == "warn"
        assert ledger.replay_stripe_event(left.event_id).outcome == "failed"
        world.wait(hours=1)
        world.refund(session, amount)
        tell(ledger, world)
    assert (ledger.event(left.event_id).status, ledger.event(left.event_id).reason) == ("ignored", "refunded")
    assert ledger.repeat_erasures() == 1
    assert ledger.event(left.event_id).payload is None
    assert_sound(ledger)


def tell(ledger: Ledger, world: World) -> None:
    """All that has happened has come, and what was asked for is answered."""
    ledger.now = world.moment + DAY
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    settle(ledger, world)


def test_an_event_that_waits_is_given_up_with_its_person(ledger: Ledger) -> None:
    ledger.open("alpha")
    about = {"id": "cs_9", "object": "checkout.session", "mode": "payment", "payment_status": "paid",
             "client_reference_id": "alpha", "metadata": {"account_id": "alpha", "package": "none"},
             "customer_details": {"email": f"{PERSONAL}@alpha"}}  # fmt: skip
    assert ledger.tell("checkout.session.completed", about, "evt_9") in {"parked", "failed"}
    ledger.erase_account("alpha")
    event = ledger.event("evt_9")
    assert (event.status, event.reason, event.payload, event.next_attempt_at) == ("ignored", "erased", None, None)
    assert ledger.process_stripe_events() == []


def test_what_is_in_use_is_not_erased(ledger: Ledger) -> None:
    prepare(ledger, "alpha", "beta")
    world = World()
    ledger.grant(100, "alpha")
    ledger.reserve("alpha", 40, "r")
    with ledger.unchanged(), refused(409, "account_in_use", reservations=1, subscriptions=0, requests=0):
        ledger.erase_account("alpha")
    assert ledger.erase_account("alpha", release_holds=True).forfeited == 100
    assert ledger.get_reservation("alpha", "r").status == "released"

    world.subscribe("beta", "basic")
    ledger.now = world.moment + DAY
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    settle(ledger, world)
    with ledger.unchanged(), refused(409, "account_in_use", subscriptions=1):
        ledger.erase_account("beta", release_holds=True)
    assert_sound(ledger)


def test_a_plan_of_our_own_ends_and_debt_stays(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    ledger.open_account("alpha", plan="free")
    ledger.revoke_grant("alpha", ledger.grant(10).grant_id, key="back")
    lot = ledger.grant(20)
    ledger.use(ledger.available())
    ledger.revoke_grant("alpha", lot.grant_id, key="owed")
    debt = ledger.get_balance("alpha").debt
    assert debt > 0
    ledger.erase_account("alpha")
    assert ledger.get_subscription_state("alpha").state == "canceled"
    assert (ledger.get_balance("alpha").debt, ledger.get_balance("alpha").balance) == (debt, 0)
    ledger.now = NOON + 400 * DAY
    ledger.erase_account("alpha")  # which books what is due
    assert ledger.get_balance("alpha").balance == 0
    assert_sound(ledger)


def test_one_member_is_gone_and_all_others_stay(ledger: Ledger) -> None:
    who = PERSONAL
    ledger.load_demo_catalog()
    for account in ("alpha", "beta"):
        ledger.open_account(account, kind="organization", plan="team")
        for member in (who, "other"):
            told = {"description": member, "subject": member, "member_id": member, "metadata": {"of": member}}
            ledger.set_member(account, member, monthly_limit=500)
            ledger.spend(account, 5, key=f"spent by {member == who}", **told)
            ledger.reserve(account, 5, f"r {member == who}", **told)
            ledger.capture(account, f"r {member == who}", 1, key=f"captured {member == who}")
            ledger.settle(account, f"r {member == who}", 3, metadata={"of": member})
            del told["description"]
            ledger.authorize_usage(account, "chapter", 100, usage_id=f"u {member == who}", **told)
            ledger.settle_usage(account, f"u {member == who}", 90)
    books = ledger.table("entries", "account_id = 'alpha' order by entry_seq")
    others = {
        name: [row for row in rows if "beta" in row or who not in row] for name, rows in ledger.snapshot().items()
    }
    ledger.reserve("alpha", 2, "open", member_id=who)
    with ledger.unchanged(), refused(409, "account_in_use", reservations=1):
        ledger.erase_member("alpha", who)
    assert ledger.erase_member("alpha", who, release_holds=True) == 9
    after = ledger.snapshot()
    assert [row for rows in after.values() for row in rows if who in row and "beta" not in row] == []
    for name in ("entries", "reservations", "usages", "members"):
        assert set(others[name]) <= set(after[name]), name
    now = ledger.table("entries", "account_id = 'alpha' order by entry_seq")
    assert [(row.amount, row.key, row.hash) for row in now] == [(row.amount, row.key, row.hash) for row in books]
    assert [row.member_id for row in ledger.list_members("alpha")] == ["other"]
    assert {row.name: row.credits for row in ledger.get_usage("alpha", group_by="member")}.keys() == {None, "other"}
    assert_sound(ledger)
    assert ledger.prove_balance("alpha").ok
    with ledger.unchanged():
        assert ledger.erase_member("alpha", who) == 0
    with refused(409, "idempotency_conflict"):
        ledger.spend("alpha", 5, key="spent by True", member_id=who)


def test_two_at_once_and_spends_beside_them(database: Database) -> None:
    with database.connect(autocommit=True) as conn:
        setup = Ledger(conn, at=None)
        setup.open("alpha", 100)
    jobs: list[Any] = [lambda ledger: ledger.erase_account("alpha")] * 2
    jobs += [lambda ledger, n=n: ledger.spend("alpha", 1, key=f"k{n}", description=PERSONAL) for n in range(4)]
    results = together(database, jobs)
    with database.connect() as conn:
        ledger = Ledger(conn, at=None)
        spent = sum(1 for result in results[2:] if hasattr(result, "entry_seq"))
        assert ledger.table("erasures")[0].forfeited == 100 - spent
        assert ledger.table("erasures")[0].times == 2
        assert_sound(ledger)
        ledger.erase_account("alpha")
        assert not any(PERSONAL in row for rows in ledger.snapshot().values() for row in rows)


def test_every_column_of_every_account_is_classified(owner: Connection[Any]) -> None:
    """A new column of text or JSON needs a row in 14_erasure.sql: what becomes of it when its account is erased."""
    found = owner.execute(
        """
        select c.relname || '.' || a.attname
          from pg_class c
          join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         where c.relnamespace = 'credits'::regnamespace and c.relkind in ('r', 'p')
           and exists (select from pg_attribute k where k.attrelid = c.oid and k.attname = 'account_id')
           and a.atttypid in ('text'::regtype, 'text[]'::regtype, 'jsonb'::regtype, 'json'::regtype)
           and a.attname <> 'account_id' and c.relname not in ('audit_runs', 'erasures')
        """
    ).fetchall()
    known = owner.execute("select table_name || '.' || column_name from credits.erasure_rules").fetchall()
    assert {name for (name,) in found} == {name for (name,) in known}


def test_a_bare_object_keeps_what_is_read(owner: Connection[Any]) -> None:
    """Every key that a function reads of Stripe's objects survives, but for those that lead to people."""
    files = [path for path in SQL.glob("6*.sql") if path.name[:2] in {"61", "63", "64", "66", "67", "68"}]
    read = set()
    for path in files:
        for quoted in re.findall(r"(?:->>?|#>>?) *'([^']+)'", path.read_text()):
            read |= set(quoted.strip("{}").split(","))
    row = owner.execute("select credits._bare_names()").fetchone()
    assert row
    of_events = {"api_version", "context", "error", "previous_attributes", "related_object", "0", "-1", ""}
    let_go = {"default_payment_method", "default_source", "invoice_settings", "url", "status_reason"}
    let_go |= {
        "active",
        "description",
        "lookup_key",
        "name",
        "tax_behavior",
    }  # of products and prices, which are nobody's
    assert read - set(row[0]) - of_events - let_go == set()
    bare = owner.execute("select credits._bare(%s)", [json.dumps({"id": "a", "email": "b", "items": [{"name": 1}]})])
    assert bare.fetchone() == ({"id": "a", "items": [{}]},)
