"""Opening balances: booked together, once, each row with an answer; and the command that reads them from a file."""

import io
from pathlib import Path
from typing import Any

import pytest
from commands import pgcredits
from ledger_support import DAY, HOUR, NOON, Ledger, assert_sound, committed, refused, together
from psycopg import Connection
from servers import Database
from stripe_world import World, prepare, settle

from pgcredits import balances


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    return Ledger(conn)


def row(key: str, account_id: str = "alpha", amount: Any = "10", **more: Any) -> dict[str, Any]:
    return {"key": key, "account_id": account_id, "amount": amount, **more}


def test_rows_become_grants_and_accounts(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    ledger.open("beta", 1, description="before")
    later = (NOON + 30 * DAY).isoformat()
    rows = [
        row("1", email="a@example.com", account_kind="organization"),
        row("2", amount=2.5, kind="purchase", expires_at=later, cost="250", cost_currency="EUR", description="pack"),
        row("3", "beta", 7),
        row("4", "gamma", 1, plan="free", kind="promo"),
    ]
    with ledger.unchanged():
        dry = ledger.import_opening_balances(rows, dry_run=True)
    done = ledger.import_opening_balances(rows)
    assert [(r.status, r.balance, r.replayed) for r in done] == [(r.status, r.balance, r.replayed) for r in dry]
    plan = ledger.get_balance("gamma").by_kind.get("plan", 0)
    assert [r.balance for r in done] == [12.5, 12.5, 8, plan + 1]
    (bought,) = ledger.table("grants", "account_id = 'alpha' and kind = 'purchase'")
    assert (bought.expires_at, bought.cost, bought.cost_currency) == (NOON + 30 * DAY, 250, "eur")
    assert (bought.source, bought.key, bought.description) == ("import", "import:2", "pack")
    opened = ledger.open_account("alpha", kind="organization", email="a@example.com")
    assert (opened.kind, opened.replayed) == ("organization", True)
    assert ledger.get_subscription_state("gamma").plan == "free"
    with ledger.unchanged():
        assert [r.replayed for r in ledger.import_opening_balances(rows)] == [True] * 4
    assert_sound(ledger)
    ledger.now = NOON + 31 * DAY
    ledger.book()
    assert ledger.get_balance("alpha").balance == 10
    assert_sound(ledger)


WRONG: dict[str, list[Any]] = {
    "key": ["", None, "k" * 241], "account_id": ["", None, "a" * 201],
    "amount": ["", None, 0, -1, "1e3", "ten", 0.1234567],
    "kind": ["salary"], "cost": [1.5, "-3", "a"],
    "expires_at": ["2029-01-01", "soon", "2030-02-31", "infinity", "9999-12-31T23:59-01:00"],
    "cost_currency": ["euro", None], "account_kind": ["robot"], "plan": ["none"],
}  # fmt: skip


def test_a_row_that_is_wrong_says_where_and_stops_no_other(ledger: Ledger) -> None:
    good = row("good", cost=1, cost_currency="usd", kind="bonus")
    rows = [{**good, "key": f"{argument}{n}", argument: value} for argument, values in WRONG.items()
            for n, value in enumerate(values)]  # fmt: skip
    with ledger.unchanged():
        answers = ledger.import_opening_balances([*rows, 5, None, []])
    wrong = [argument for argument, values in WRONG.items() for _ in values] + ["row"] * 3
    assert [(r.status, r.code, r.detail["argument"]) for r in answers] == [(400, "invalid_request", a) for a in wrong]
    assert all(r.hint for r in answers)
    answers = ledger.import_opening_balances([rows[0], good, rows[1]])
    assert [r.status for r in answers] == [400, 200, 400]
    assert ledger.available() == 10


def test_what_was_brought_in_is_known_also_after_its_end_and_without_its_plan(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    rows = [row("1", plan="free"), row("2", expires_at=(NOON + DAY).isoformat())]
    assert [r.status for r in ledger.import_opening_balances(rows)] == [200, 200]
    ledger.now += 2 * DAY
    ledger.book()
    ledger.change("update credits.plans set active = false where code = 'free'")
    others = [
        row("3", plan="free"),
        {**rows[1], "key": "4"},
        {**rows[1], "amount": 11},
        {**rows[1], "expires_at": "soon"},
    ]
    with ledger.unchanged():
        answers = ledger.import_opening_balances([*rows, *others])
    assert [(r.status, r.replayed) for r in answers[:2]] == [(200, True)] * 2
    assert [r.status for r in answers[2:]] == [400, 400, 409, 400]


def test_keys_closed_accounts_and_debts(ledger: Ledger) -> None:
    ledger.open("alpha")
    ledger.open("closed")
    ledger.set_status("closed", "closed")
    lot = ledger.grant(10)
    ledger.use(10)
    ledger.revoke_grant("alpha", lot.grant_id, key="back")
    assert ledger.get_balance("alpha").debt == 10
    ledger.open("scoped", 5, scope=["chapter"])
    rows = [row("1"), row("2", amount=4), row("1"), row("1", amount=11), row("1", "closed"), row("1", "scoped", 3)]
    answers = ledger.import_opening_balances(rows)
    expected = [(200, False), (200, False), (200, True), (409, None), (423, None), (200, False)]
    assert [(r.status, r.replayed) for r in answers] == expected
    assert [r.code for r in answers] == [None, None, None, "idempotency_conflict", "account_closed", None]
    assert ledger.sums("alpha") == (4, 0, 4, 0)
    assert ledger.get_balance("scoped").available == 3
    assert_sound(ledger)
    with refused(400, "invalid_request"):
        ledger.rows("import_opening_balances", balances=None)


def test_the_same_rows_from_many_at_once_are_booked_once(database: Database) -> None:
    rows = [row(str(n), f"account {n % 7}", n + 1) for n in range(40)]
    answers = together(database, [lambda ledger: ledger.import_opening_balances(rows)] * 4)
    for answer in zip(*answers, strict=True):
        assert [r.status for r in answer] == [200] * 4
        assert sorted(r.replayed for r in answer) == [False, True, True, True]
    with committed(database) as ledger:
        assert sum(ledger.get_balance(f"account {n}").balance for n in range(7)) == sum(range(41))
        assert_sound(ledger)


def test_the_command_names_the_line_of_each_refused_row_and_goes_on_where_it_ended(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "old.csv"
    lines = ["key,account_id,amount,description", '1,alpha,10,"two', 'lines"', "2,alpha,ten,", "", "3,beta,5,x"]
    file.write_text("\n".join(lines) + "\n")
    command = (database, capsys, "import", "balances")
    code, said, _ = pgcredits(*command, str(file), "--dry-run")
    assert (code, said) == (1, "Would be booked: 2. Known before: 0. Refused: 1.\n")
    code, said, complaints = pgcredits(*command, str(file), "--batch", "1")
    assert (code, said) == (1, "Booked: 2. Known before: 0. Refused: 1.\n")
    assert complaints.startswith(f"{file}:4: amount 'ten': invalid_request: An amount is")
    assert complaints.count("\n") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text().replace("ten", "7")))
    assert pgcredits(*command, "-") == (0, "Booked: 1. Known before: 2. Refused: 0.\n", "")
    with committed(database) as ledger:
        assert (ledger.available("alpha"), ledger.available("beta")) == (17, 5)
        assert_sound(ledger)


BROKEN = {
    "key,amount\n": ":1: there is no column account_id; known are",
    "key,account_id,amount,credit\n": ":1: there can be no column credit; known are",
    "key,key,account_id,amount\n": ":1: given twice is key; known are",
    "key,account_id,amount\n1,alpha,5\n2,alpha\n": ":3: 2 values, but 3 columns",
    "key,account_id,amount\n1,alpha,5,6\n2,alpha,5\n3\n": ":2: 4 values, but 3 columns\n{file}:4: 1 values, but",
    'key,account_id,amount\n1,"al"pha,5\n': ":2: ",
    "key,account_id,amount\n1,al\0pha,5\n": ":2: has a character that PostgreSQL cannot hold",
}


def test_a_file_that_is_broken_is_refused_whole(tmp_path: Path) -> None:
    file = str(tmp_path / "a.csv")
    for text, complaint in BROKEN.items():
        Path(file).write_text(text)
        with pytest.raises(balances.BalancesError) as caught:
            balances.read(file)
        assert str(caught.value).startswith(f"{file}{complaint}".replace("{file}", file))
    Path(file).write_bytes(b"\xff\xfe")
    for broken, complaint in ((file, "is not a text in UTF-8"), (str(tmp_path / "none.csv"), "cannot be read")):
        with pytest.raises(balances.BalancesError, match=complaint):
            balances.read(broken)


def test_the_move_from_an_existing_handler(ledger: Ledger) -> None:
    """docs/migration-from-existing.md, step by step: nothing is granted twice, nothing after the switch is missed."""
    world = World()
    prepare(ledger)
    ledger.set_stripe_endpoint("shadow", mode="shadow")
    customer = world.customer("alpha", named=True)
    world.buy("alpha", customer=customer)
    subscription = world.subscribe("alpha", "basic")
    before = list(world.events)
    ledger.now = world.moment + HOUR
    for event in before:
        assert ledger.receive_stripe_event("shadow", event.payload).outcome == "ignored"
    effects = {row.type for row in ledger.list_stripe_events(status="ignored") if row.effects}
    assert "customer.subscription.created" in effects

    moved = [row("1", amount=700, kind="purchase"), row("2", amount=900, kind="plan")]
    assert [r.status for r in ledger.import_opening_balances(moved)] == [200, 200]
    ledger.set_stripe_endpoint("shadow", mode="live")
    for event in before:
        if event.type.startswith(("customer.", "product.", "price.")):
            assert ledger.replay_stripe_event(event.event_id).outcome == "applied", event
    settle(ledger, world)
    assert ledger.get_balance("alpha").balance == 1600
    assert ledger.get_subscription_state("alpha").plan == "basic"

    known = len(world.events)
    world.renew(subscription)
    ledger.now = world.moment + HOUR
    for event in world.events[known:]:
        assert ledger.receive_stripe_event("shadow", event.payload).outcome in {"applied", "ignored"}
    settle(ledger, world)
    assert ledger.get_balance("alpha").balance == 2600
    assert_sound(ledger)
