"""Notifications: who is told what, once; and what becomes of each delivery. In SQL alone."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from client import CreditsError
from ledger_support import DAY, HOUR, MINUTE, SECOND, Ledger, assert_sound, committed, session, together
from psycopg import Connection
from servers import ONE_ENGINE, Database

SQL = "".join(path.read_text() for path in sorted(Path(__file__).resolve().parents[1].glob("sql/*.sql")))
LEASE = 2 * MINUTE


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha")
    ledger.open("beta")
    return ledger


def told(ledger: Ledger, kind: str | None = None) -> list[tuple[str, str | None]]:
    """The notifications, by kind and account, in their order."""
    return [(row.kind, row.account_id) for row in reversed(ledger.list_notifications(kind=kind))]


def notify(ledger: Ledger, kind: str, key: str = "1", account_id: str | None = "alpha", data: Any = None) -> int:
    """Tell something; its number."""
    with ledger.as_owner():
        ledger.query("select credits._notify(%s, %s, %s, %s::jsonb)", account_id, kind, key, json.dumps(data or {}))
    number: int = ledger.list_notifications(kind=kind)[0].notification_id
    return number


def setting(ledger: Ledger, name: str, value: str) -> None:
    ledger.change("update credits.settings set value = %s::jsonb where name = %s", value, name)


def targets(ledger: Ledger, notification_id: int) -> set[str]:
    return {row.target for row in ledger.table("notification_deliveries", "notification_id = %s", notification_id)}


def stands(ledger: Ledger, delivery_id: int) -> tuple[str, int]:
    (row,) = ledger.table("notification_deliveries", "delivery_id = %s", delivery_id)
    return row.state, row.attempts


def wait(delivery_id: int, base: timedelta) -> timedelta:
    return base * (100 + delivery_id % 21) / 100


# Who hears of what ---------------------------------------------------------------------------------------------------


def test_every_kind_that_is_told_is_listed(ledger: Ledger) -> None:
    listed = {row.kind: row.audience for row in ledger.table("notification_kinds")}
    calls = r"(?:_notify\([^';]*|_tell_\w+\([^';]*|then|else) ?'(stripe_\w+|subscription_\w+|job_\w+|[a-z]+_[a-z_]+)'"
    found = {kind for kind in re.findall(calls, SQL) if kind in listed}
    assert set(re.findall(r"_notify\(\S+ '(\w+)'", SQL)) <= set(listed)
    assert {"low_balance", "credits_expiring", "stripe_event_given_up", "stripe_key_refused"} <= found
    texts = {row.kind for row in ledger.table("notification_texts")}
    assert texts == {kind for kind, audience in listed.items() if audience == "customer"}


def test_endpoints_get_what_they_want(ledger: Ledger) -> None:
    ledger.set_notification_endpoint("all", "https://example.com/a")
    ledger.set_notification_endpoint("some", "https://example.com/b", kinds=["refund", "dispute"])
    ledger.set_notification_endpoint("one", "http://127.0.0.1:9/c", account_id="beta")
    assert targets(ledger, notify(ledger, "refund")) == {"all", "some"}
    assert targets(ledger, notify(ledger, "low_balance", account_id="beta")) == {"all", "one"}
    assert targets(ledger, notify(ledger, "never_heard_of", account_id=None)) == {"all"}
    assert notify(ledger, "refund") == ledger.list_notifications(kind="refund")[0].notification_id  # once per cause
    assert len(ledger.list_notifications()) == 3
    rows = [(row.name, row.pending, row.dead) for row in ledger.list_notification_endpoints()]
    assert rows == [("all", 3, 0), ("one", 1, 0), ("some", 1, 0)]

    off = ledger.set_notification_endpoint("all", "https://example.com/a", enabled=False)
    assert (off.enabled, off.pending) == (False, 3)
    number = notify(ledger, "refund", "2")
    assert {row.target for row in ledger.claim_notifications()} == {"one", "some"}
    ledger.set_notification_endpoint("all", "https://example.com/new")
    later = ledger.claim_notifications()
    assert [(row.target, row.address) for row in later] == [("all", "https://example.com/new")] * 4
    assert ledger.remove_notification_endpoint("all")
    assert not ledger.remove_notification_endpoint("all")
    assert targets(ledger, number) == {"some"}
    assert ledger.replay_notification(number, target="all") == []


def test_an_endpoint_gets_what_it_wants_when_it_is_sent(ledger: Ledger) -> None:
    def narrow(**to: Any) -> None:
        ledger.set_notification_endpoint("shop", "https://example.com/a", **to)

    narrow()
    ours, theirs = notify(ledger, "refund", "1", "alpha"), notify(ledger, "refund", "2", "beta")
    of_all, other = notify(ledger, "refund", "3", None), notify(ledger, "dispute")
    narrow(account_id="alpha", kinds=["refund"])
    assert ledger.list_notification_endpoints()[0].pending == 1  # what it does not want waits no longer
    (sent,) = ledger.claim_notifications()
    assert sent.message_id == f"ntf_{ours}"
    assert [ledger.replay_notification(number) for number in (theirs, of_all, other)] == [[]] * 3
    narrow(account_id="beta")
    assert ledger.replay_notification(ours) == []
    ledger.now += LEASE  # its worker was killed
    assert ledger.claim_notifications() == []
    assert [row.target for row in ledger.replay_notification(theirs)] == ["shop"]


def test_nothing_goes_to_an_endpoint_that_is_switched_off(ledger: Ledger) -> None:
    address = "https://example.com/a"
    ledger.set_notification_endpoint("shop", address)
    notify(ledger, "refund", "on its way")
    assert len(ledger.claim_notifications()) == 1
    ledger.set_notification_endpoint("shop", address, enabled=False)
    notify(ledger, "refund", "later")
    ledger.now += DAY  # its worker was killed
    assert ledger.claim_notifications() == []
    figures = {(row.name, row.labels.get("state")): row.value for row in ledger.metrics()}
    assert figures["pgcredits_notifications", "pending"] == figures["pgcredits_notifications", "sent"] == 1
    assert figures["pgcredits_notifications_late_seconds", None] == 0
    assert {row.status for row in ledger.health() if row.name == "notifications_are_sent"} == {"ok"}
    ledger.set_notification_endpoint("shop", address)
    assert sorted(row.attempt for row in ledger.claim_notifications()) == [1, 2]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False, None])
@ONE_ENGINE
def test_an_endpoint_that_changes_while_something_is_told(
    database: Database, *, before: bool, after: bool | None
) -> None:
    def change(ledger: Ledger, enabled: bool | None) -> None:
        if enabled is None:
            ledger.remove_notification_endpoint("shop")
        else:
            ledger.set_notification_endpoint("shop", "https://example.com/a", enabled=enabled)

    with committed(database) as ledger, ThreadPoolExecutor(1) as pool:
        ledger.open("alpha", 10)
        ledger.set_low_balance_alert("alpha", 5)
        change(ledger, before)
        with committed(database) as other:
            with ledger.conn.transaction():
                ledger.use(6)
                changing = pool.submit(change, other, after)
                wait_for([changing], timeout=0.3)  # it may have to wait for what is told
            changing.result()
        assert len(ledger.claim_notifications()) == (after is True)
        change(ledger, enabled=True)
        assert len(ledger.claim_notifications()) == (after is False)
        (told_,) = ledger.list_notifications()
        assert [row["state"] for row in told_.deliveries] == ["sent"] * (after is not None)


def test_a_target_that_has_its_share_of_a_worker_comes_after_the_others(ledger: Ledger) -> None:
    ledger.set_notification_endpoint("slow", "https://example.com/a")
    for number in range(40):
        notify(ledger, "low_balance", f"of slow {number}")
    ledger.set_notification_endpoint("shop", "https://example.com/b", kinds=["refund"])
    for number in range(5):
        notify(ledger, "refund", f"of both {number}")

    def claimed(worker: str, rows: int) -> list[str]:
        return sorted(row.target for row in ledger.claim_notifications(rows, worker))

    setting(ledger, "notification_target_places", "2")
    first = ledger.claim_notifications(4, "one")
    assert sorted(row.target for row in first) == ["shop", "shop", "slow", "slow"]  # shop's are behind forty of slow's
    assert claimed("one", 3) == ["slow"] * 3  # both have their share, and the places are free
    assert claimed("two", 3) == ["shop", "slow", "slow"]
    ledger.complete_notification(next(row.delivery_id for row in first if row.target == "shop"), 204)
    assert claimed("one", 1) == ["shop"]
    ledger.now += LEASE
    assert claimed("one", 4) == ["shop", "shop", "slow", "slow"]  # what nobody brought back comes again


def test_e_mail_is_for_whom_it_concerns(ledger: Ledger) -> None:
    ledger.open_account("gamma", email="gamma@example.com")
    ledger.open_account("delta", email="delta@example.com, evil@example.com")
    notify(ledger, "low_balance", "0", "gamma")
    assert ledger.claim_notifications() == []
    setting(ledger, "customer_email", '["low_balance"]')
    setting(ledger, "operator_email", '"ops@example.com"')
    setting(ledger, "product_name", '"Acme {kind}"')
    numbers = [
        notify(ledger, "low_balance", name, name, {"balance": 5, "threshold": 20})
        for name in ("gamma", "alpha", "delta")
    ]
    numbers += [
        notify(ledger, "refund", "1", "gamma"),
        notify(ledger, "job_failed", "1", None, {"job": "expire\ngrants"}),
    ]
    numbers += [notify(ledger, "subscription_started", "1", "gamma"), notify(ledger, "never_heard_of", "1", "gamma")]
    assert [targets(ledger, n) for n in numbers] == [
        {"customer"}, set(), {"customer"}, set(), {"operator"}, set(), {"operator"}
    ]  # fmt: skip
    assert ledger.claim_notifications(channels=["webhook"]) == []
    sent = {row.message_id: row for row in ledger.claim_notifications()}
    assert set(sent) == {f"ntf_{n}" for n in (numbers[0], numbers[4], numbers[6])}
    mail = sent[f"ntf_{numbers[0]}"]
    assert (mail.address, mail.subject) == ("gamma@example.com", "Your credits are running low")
    assert mail.body.startswith("You have 5 credits left, less than the 20 ")
    assert mail.body.endswith("\n\n-- \nAcme {kind}\n")  # a value is no template
    facts = sent[f"ntf_{numbers[4]}"]
    assert (facts.address, facts.subject) == ("ops@example.com", "pgcredits: job_failed")
    assert '"job": "expire\\ngrants"' in facts.body
    (dead,) = ledger.list_notifications(state="dead")
    assert (dead.notification_id, dead.deliveries[0]["last_error"]) == (
        numbers[2],
        "There is no address to send it to.",
    )
    for delivery in sent.values():
        ledger.complete_notification(delivery.delivery_id, 500 if delivery.target == "operator" else None)
    setting(ledger, "customer_email", '["refund"]')
    setting(ledger, "operator_email", '""')
    ledger.now += HOUR
    assert ledger.claim_notifications() == []
    assert [targets(ledger, n) for n in (numbers[0], numbers[6])] == [set(), {"operator"}]  # 5xx of a mail server: dead
    assert [ledger.replay_notification(n) for n in (numbers[2], numbers[6])] == [[], []]


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("a.b+c@example.com", True), ("jürgen@müller.de", True), ("a@localhost", True), ("a@example.com.", False),
        ("a[b@x.com", False), ("a@.x.com", False), ("a@x..com", False), ("ä+b.c@x-y.example.com", True),
        ("=?utf-8?q?victim=40example=2Ecom?=@x.com", False), ("a@b@example.com", False), ("a,b@example.com", False),
        ("a@x.com\nBcc: b@x.com", False), ("A <a@x.com>", False), ("", False),
    ],
)  # fmt: skip
def test_an_address_is_one_address(ledger: Ledger, *, address: str, sent: bool) -> None:
    setting(ledger, "customer_email", '["low_balance"]')
    ledger.change("update credits.accounts set email = %s where account_id = 'alpha'", address)
    notify(ledger, "low_balance", "1", "alpha", {"balance": 5, "threshold": 20})
    assert [row.address for row in ledger.claim_notifications()] == [address] * sent


def test_every_text_says_its_values(ledger: Ledger) -> None:
    setting(ledger, "customer_email", "true")
    ledger.change("update credits.accounts set email = 'alpha@example.com'")
    data = {"balance": 5, "threshold": 20, "amount": 1250, "currency": "eur", "credits": 100, "package": "Starter",
            "purchase_id": 7, "reason": "declined", "expires_at": "2030-02-05T23:30:00+00:00"}  # fmt: skip
    ledger.set_time_zone("alpha", "Europe/Berlin")
    for row in ledger.table("notification_texts"):
        assert set(re.findall(r"\{(\w+)\}", row.subject + row.body)) <= {*data, "money", "end"}
        notify(ledger, row.kind, data=data)
    mails = {row.subject: row.body for row in ledger.claim_notifications(100)}
    assert not [text for mail in mails.items() for text in mail if re.search(r"[{}]|  |null| \.", text)]
    assert "Receipt: 100 credits for 12.50 EUR" in mails
    assert "1250 of your credits end on 6 February 2030" in mails
    money = "select credits._money(500, 'jpy') as a, credits._money(500, 'kwd') as b, credits._money(5, 'usd') as c"
    with ledger.as_owner():
        assert ledger.query(money) == [("500 JPY", "0.500 KWD", "0.05 USD")]


def test_the_statements_of_the_manual_run(ledger: Ledger) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/notifications.md").read_text()
    ledger.open("user_1")
    number = notify(ledger, "refund")
    with ledger.as_owner():
        for block in re.findall(r"```sql\n(.*?)```", page, re.DOTALL):
            ledger.conn.execute(block.replace("(42)", f"({number})").encode())
    ledger.open_account("gamma", email="gamma@example.com")
    assert targets(ledger, notify(ledger, "low_balance", "2", "gamma")) == {"shop", "customer"}
    assert targets(ledger, notify(ledger, "job_failed", "2")) == {"operator"}


# Deliveries ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def delivery(ledger: Ledger) -> int:
    """One that is claimed."""
    ledger.set_notification_endpoint("shop", "https://example.com/hook")
    number = notify(ledger, "refund", data={"amount": 5})
    (row,) = ledger.claim_notifications(worker="one")
    assert (row.attempt, row.address, row.message_id) == (1, "https://example.com/hook", f"ntf_{number}")
    assert json.loads(row.body) == {
        "type": "refund", "timestamp": "2030-01-31T12:00:00.000000Z", "id": f"ntf_{number}", "account_id": "alpha",
        "key": "1", "data": {"amount": 5},
    }  # fmt: skip
    delivery_id: int = row.delivery_id
    return delivery_id


def test_a_lease_is_kept_and_ends(ledger: Ledger, delivery: int) -> None:
    ledger.now += LEASE - SECOND
    assert ledger.claim_notifications(worker="two") == []
    ledger.now += SECOND
    (again,) = ledger.claim_notifications(worker="two")
    assert (again.delivery_id, again.attempt) == (delivery, 2)
    assert ledger.complete_notification(delivery, 500, attempt=1).state == "sent"  # late, and no longer waited for
    assert ledger.complete_notification(delivery, 204, attempt=1).state == "delivered"  # late, and it counts
    assert ledger.complete_notification(delivery, 500, attempt=2).state == "delivered"
    assert ledger.claim_notifications() == []


@pytest.mark.parametrize(
    ("status", "state"),
    [(200, "delivered"), (299, "delivered"), (302, "pending"), (400, "pending"), (410, "dead"), (500, "pending"),
     (550, "pending"), (None, "pending")],
)  # fmt: skip
def test_what_becomes_of_a_webhook(ledger: Ledger, delivery: int, status: int | None, state: str) -> None:
    row = ledger.complete_notification(delivery, status, answer="x" * 600, attempt=1)
    assert (row.state, row.last_status) == (state, status)
    assert row.last_error == (None if state == "delivered" else "x" * 500)
    if state == "pending":
        assert row.next_attempt_at == ledger.now + wait(delivery, 5 * SECOND)
    with ledger.unchanged():
        ledger.complete_notification(delivery, status or 500, attempt=1)


def test_it_is_given_up_told_once_a_day_and_sent_again(ledger: Ledger, delivery: int) -> None:
    waits = [5 * SECOND, 30 * SECOND, 2 * MINUTE, 10 * MINUTE, HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, DAY, DAY]
    for base in waits:
        row = ledger.complete_notification(delivery, 503, answer="busy")
        assert (row.state, row.next_attempt_at - ledger.now) == ("pending", wait(delivery, base))
        ledger.now = row.next_attempt_at - SECOND
        assert ledger.claim_notifications() == []
        ledger.now += SECOND
        assert len(ledger.claim_notifications()) == 1
    assert ledger.complete_notification(delivery, 503, answer="busy").state == "dead"
    (given_up,) = ledger.list_notifications(kind="notification_given_up")
    assert given_up.data["error"] == "busy"
    notify(ledger, "refund", "2")
    for row in ledger.claim_notifications():  # the other one, and the word of the dead one, to the same endpoint
        ledger.complete_notification(row.delivery_id, 410)
    assert len(ledger.list_notifications(kind="notification_given_up")) == 1
    assert ledger.list_notification_endpoints()[0].dead == 3

    assert ledger.retry_notifications("shop", max_rows=2) == 2
    assert [row.attempt for row in ledger.claim_notifications()] == [1, 1]
    assert ledger.retry_notifications("shop") == 1
    assert ledger.retry_notifications("shop") == 0
    (last,) = ledger.claim_notifications()
    for row in ledger.table("notification_deliveries"):
        ledger.complete_notification(row.delivery_id, 200)
    ledger.set_notification_endpoint("new", "https://example.com/new")
    (first,) = (row for row in ledger.list_notifications(kind="refund") if row.key == "1")
    again = ledger.replay_notification(first.notification_id)
    assert [(row.target, row.state) for row in again] == [("shop", "pending"), ("new", "pending")]
    assert {row.message_id for row in ledger.claim_notifications()} == {f"ntf_{first.notification_id}"}
    assert {row.state for row in ledger.replay_notification(first.notification_id)} == {"sent"}
    assert last.delivery_id


def test_one_that_no_worker_survives_ends(ledger: Ledger, delivery: int) -> None:
    setting(ledger, "notification_max_attempts", "3")
    for _ in range(2):
        ledger.now += LEASE
        assert len(ledger.claim_notifications()) == 1
    ledger.now += LEASE
    assert [row.target for row in ledger.claim_notifications()] == []
    assert stands(ledger, delivery) == ("dead", 4)
    assert told(ledger, "notification_given_up")


def test_fewer_attempts_end_what_has_had_more_and_keep_its_last_answer(ledger: Ledger, delivery: int) -> None:
    for status in (503, 502):
        ledger.now = ledger.complete_notification(delivery, status, answer=f"busy {status}").next_attempt_at
        ledger.claim_notifications()
    ledger.now = ledger.complete_notification(delivery, 504, answer="busy 504").next_attempt_at
    setting(ledger, "notification_max_attempts", "2")
    assert ledger.claim_notifications() == []
    (given_up,) = ledger.list_notifications(kind="notification_given_up")
    assert (given_up.data["status"], given_up.data["error"]) == (504, "busy 504")
    assert ledger.retry_notifications("shop") == 1
    assert delivery in [row.delivery_id for row in ledger.claim_notifications()]


def test_a_mail_that_is_refused_for_good(ledger: Ledger) -> None:
    setting(ledger, "operator_email", '"ops@example.com"')
    for key, status, state in (("1", 550, "dead"), ("2", 451, "pending"), ("3", 250, "delivered")):
        notify(ledger, "job_failed", key)
        (row,) = (row for row in ledger.claim_notifications() if "job_failed" in row.subject)
        assert ledger.complete_notification(row.delivery_id, status).state == state
        ledger.change("update credits.notification_deliveries set next_attempt_at = 'infinity' where state = 'pending'")


def test_the_list_turns_pages_and_old_ones_go(ledger: Ledger, delivery: int) -> None:
    numbers = [notify(ledger, "low_balance", str(n), "beta") for n in range(3)]
    page = ledger.list_notifications(max_rows=2)
    assert [row.notification_id for row in page] == numbers[:0:-1]
    rest = ledger.list_notifications(before=page[-1].notification_id)
    assert [row.kind for row in rest] == ["low_balance", "refund"]
    assert len(ledger.list_notifications(account_id="beta")) == 3
    assert [row.kind for row in ledger.list_notifications(state="sent")] == ["refund"]
    for row in ledger.claim_notifications(2):
        ledger.complete_notification(row.delivery_id, 200)
    ledger.now += 90 * DAY
    assert ledger.purge_notifications() == 0
    ledger.now += SECOND
    notify(ledger, "low_balance", "new", "beta")
    assert [ledger.purge_notifications(max_rows=1) for _ in range(3)] == [1, 1, 0]
    assert told(ledger) == [("refund", "alpha"), ("low_balance", "beta"), ("low_balance", "beta")]
    assert stands(ledger, delivery) == ("sent", 1)


# Low balances --------------------------------------------------------------------------------------------------------


def lows(ledger: Ledger, account_id: str = "alpha") -> list[Any]:
    """What was told of low balances: the balance of each."""
    rows = reversed(ledger.list_notifications(kind="low_balance", account_id=account_id))
    return [row.data["balance"] for row in rows]


def test_a_fall_is_told_once_and_again_after_a_rise(ledger: Ledger) -> None:
    assert ledger.set_low_balance_alert("alpha", 20) == ("alpha", 20, True)
    ledger.grant(100)
    assert lows(ledger) == []
    ledger.use(80)
    assert lows(ledger) == []  # 20 is not below 20
    with pytest.raises(CreditsError):
        ledger.use(21)
    ledger.use(1)
    ledger.use(1)
    assert lows(ledger) == [19]
    ledger.grant(1)
    ledger.use(1)
    assert lows(ledger) == [19]
    ledger.grant(2)  # exactly 20: above again
    ledger.spend("alpha", 5, key="s")
    assert lows(ledger) == [19, 15]
    ledger.refund_spend("alpha", "s", key="r")
    ledger.adjust("alpha", -10, key="a")
    assert lows(ledger) == [19, 15, 10]
    assert ledger.set_low_balance_alert("alpha") == ("alpha", None, False)
    ledger.grant(20)
    ledger.use(30)
    assert len(lows(ledger)) == 3
    assert_sound(ledger)


def test_holds_count_until_they_are_used(ledger: Ledger) -> None:
    ledger.grant(100)
    ledger.set_low_balance_alert("alpha", 50)
    ledger.reserve("alpha", 60, "r1")
    ledger.release("alpha", "r1")
    ledger.reserve("alpha", 60, "r2")
    ledger.capture("alpha", "r2", 10, key="c")
    assert lows(ledger) == []
    ledger.settle("alpha", "r2", 45)
    assert lows(ledger) == [45]
    ledger.reserve("alpha", 40, "r3")
    ledger.now += HOUR
    ledger.settle("alpha", "r3", 40)
    assert lows(ledger) == [45]


FALLS: dict[str, Callable[[Ledger], Any]] = {
    "settle": lambda ledger: ledger.settle("alpha", "r", 60),
    "capture": lambda ledger: ledger.capture("alpha", "r", 60, key="c"),
    "spend_many": lambda ledger: ledger.spend_many(
        [{"account_id": "alpha", "amount": 30, "key": f"m{n}"} for n in (1, 2)]
    ),
    "transfer": lambda ledger: ledger.transfer_credits("alpha", "beta", 60, key="t"),
    "revoke": lambda ledger: ledger.revoke_grant("alpha", ledger.table("grants")[0].grant_id, amount=60, key="v"),
    "scoped": lambda ledger: ledger.spend("alpha", 60, capability="songs", key="x"),
}


def test_it_is_told_by_whatever_makes_it_fall(ledger: Ledger) -> None:
    for fall, act in FALLS.items():
        with ledger.conn.transaction(force_rollback=True):
            ledger.grant(100)
            ledger.set_low_balance_alert("alpha", 50)
            if fall in ("settle", "capture"):
                ledger.reserve("alpha", 60, "r")
            if fall == "scoped":  # scoped credits neither count nor hide it
                ledger.grant(1000, scope=["dance"])
            act(ledger)
            assert lows(ledger) == [40], fall
            assert_sound(ledger)


def test_an_expiry_tells_when_it_is_booked_and_debt_counts(ledger: Ledger) -> None:
    ledger.grant(10)
    ledger.grant(100, expires_at=ledger.now + DAY)
    ledger.set_low_balance_alert("alpha", 50)
    ledger.now += 2 * DAY
    ledger.get_balance("alpha")
    assert lows(ledger) == []
    ledger.book()
    assert lows(ledger) == [10]
    ledger.grant(100, key="g")
    ledger.use(105)
    assert lows(ledger) == [10, 5]
    (lot,) = ledger.table("grants", "key = 'g'")
    ledger.revoke_grant("alpha", lot.grant_id, amount=100, key="v")
    assert ledger.sums()[3] > 0
    ledger.grant(100)  # the debt is paid first: still low
    ledger.grant(100)
    ledger.use(90)
    assert lows(ledger)[2:] == [15]


def test_credits_that_come_with_what_ends_are_no_fall(ledger: Ledger) -> None:
    """One lot ends at the moment at which another begins, and both are booked late."""
    ledger.set_low_balance_alert("alpha", 50)
    noon = ledger.now
    ledger.grant(100, expires_at=noon + DAY)
    ledger.grant(100, effective_at=noon + DAY, expires_at=noon + 2 * DAY)
    ledger.now += DAY + HOUR
    ledger.book()
    assert lows(ledger) == []
    ledger.use(10, key="u")
    ledger.now += DAY
    ledger.refund_spend("alpha", "u", key="r")  # what returns has ended
    assert lows(ledger) == [0]


def test_a_month_of_a_plan_that_turns_is_no_fall(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    ledger.open_account("gamma", plan="team")
    ledger.set_low_balance_alert("gamma", 50)
    for _ in range(3):
        ledger.now += 31 * DAY
        ledger.book("gamma")
    assert lows(ledger, "gamma") == []


def test_accounts_get_the_setting_when_they_are_opened(ledger: Ledger) -> None:
    setting(ledger, "low_balance_threshold", "25")
    ledger.open("gamma", 100)
    ledger.use(90, "gamma")
    ledger.grant(100)
    ledger.use(90)
    assert (lows(ledger), lows(ledger, "gamma")) == ([], [10])


def test_threads_that_cross_together_tell_once(database: Database) -> None:
    with committed(database) as ledger:
        ledger.open("alpha", 100)
        ledger.set_low_balance_alert("alpha", 50)
        keys = count()
        for times in (1, 2):
            together(database, [lambda mine: [mine.use(1, key=str(next(keys))) for _ in range(10)]] * 8)
            assert lows(ledger) == [49] * times
            ledger.grant(60)  # 20 + 60 - 80
        assert ledger.available() == 60
        ledger.use(20)
        assert lows(ledger) == [49, 49, 40]
        assert_sound(ledger)


# Credits that end ----------------------------------------------------------------------------------------------------


def test_credits_that_end_soon_are_told_once(ledger: Ledger) -> None:
    for name, days in (("alpha", 7), ("beta", 3), ("beta", 8)):
        ledger.grant(10, name, expires_at=ledger.now + days * DAY)
    ledger.grant(10, "beta", kind="plan", expires_at=ledger.now + DAY)
    ledger.grant(10, "beta", effective_at=ledger.now + DAY, expires_at=ledger.now + 2 * DAY)
    ledger.grant(10)
    ledger.use(4)
    assert [ledger.warn_expiring_credits(max_rows=1) for _ in range(3)] == [1, 1, 0]
    assert told(ledger) == [("credits_expiring", "beta"), ("credits_expiring", "alpha")]
    assert ledger.list_notifications()[0].data["amount"] == 6
    ledger.now += DAY
    ledger.book("beta")
    assert ledger.warn_expiring_credits() == 2  # the one that began, and the one of 8 days
    assert ledger.warn_expiring_credits() == 0
    ledger.now += 30 * DAY
    assert ledger.warn_expiring_credits() == 0
    assert_sound(ledger)


# Causes in what Stripe tells -----------------------------------------------------------------------------------------


def test_money_that_comes_and_goes_is_told(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    ledger.tell("checkout.session.completed", session())
    ledger.tell("checkout.session.completed", session(), "evt_again")
    (receipt,) = ledger.list_notifications(kind="purchase_receipt")
    assert (receipt.account_id, receipt.data["amount"], receipt.data["credits"]) == ("alpha", 1000, 1000)
    refund = {
        "id": "re_1",
        "object": "refund",
        "amount": 400,
        "currency": "usd",
        "payment_intent": "pi_1",
        "charge": None,
    }
    for status in ("pending", "succeeded", "succeeded", "failed"):
        ledger.now += MINUTE
        ledger.tell("refund.updated", {**refund, "status": status})
    dispute = {
        "id": "dp_1",
        "object": "dispute",
        "amount": 1000,
        "currency": "usd",
        "payment_intent": "pi_1",
        "charge": None,
    }
    for status in ("needs_response", "needs_response", "lost"):
        ledger.now += MINUTE
        ledger.tell("charge.dispute.updated", {**dispute, "status": status})
    unpaid = session("cs_2", payment_status="unpaid", payment_intent="pi_2")
    for kind in ("checkout.session.completed", *["checkout.session.async_payment_failed"] * 2):
        ledger.now += MINUTE
        ledger.tell(kind, unpaid)
    assert told(ledger) == [
        (kind, "alpha")
        for kind in ("purchase_receipt", "refund", "refund_failed", "dispute", "dispute", "payment_failed")
    ]
    assert_sound(ledger)
