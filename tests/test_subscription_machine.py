"""The machine of subscriptions: its rows say what may happen, Stripe is followed, and every move is remembered."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import permutations, product
from typing import Any

import psycopg
import pytest
from client import ours
from ledger_support import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    SECOND,
    TICK,
    Ledger,
    assert_sound,
    committed,
    refused,
    together,
    told,
)
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import Database

SAYS: dict[str, dict[str, Any]] = {  # what Stripe says of a subscription in each of our states
    "incomplete": {"status": "incomplete"},
    "trialing": {"status": "trialing"},
    "active": {"status": "active"},
    "canceling": {"status": "active", "cancel_at_period_end": True},
    "past_due": {"status": "past_due"},
    "unpaid": {"status": "unpaid"},
    "paused": {"status": "paused"},
    "canceled": {"status": "canceled"},
}


def subscription(subscription_id: str = "sub_1", price: str = "price_basic", days: int = 365, **says: Any) -> Any:
    """A subscription of Stripe of alpha, from NOON on."""
    start = int(NOON.timestamp())
    sold = {"id": price, "product": "prod_1", "unit_amount": 1000, "recurring": {"interval": "year"}}
    item = {"id": "si_1", "price": sold, "quantity": 1, "current_period_start": start,
            "current_period_end": start + days * 86400}  # fmt: skip
    return {
        "id": subscription_id, "object": "subscription", "customer": "cus_1", "created": start,
        "metadata": {"account_id": "alpha"}, "items": {"data": [item]}, "billing_cycle_anchor": start, **says,
    }  # fmt: skip


def prepare(ledger: Ledger) -> None:
    """Plans that are sold by Stripe, one of our own, and an account."""
    ledger.change(
        "insert into credits.plans (code, name, monthly_credits, stripe_price_ids) values "
        "('basic', 'Basic', 300, '{price_basic}'), ('pro', 'Pro', 900, '{price_pro}'), ('free', 'Free', 10, '{}')"
    )
    ledger.open("alpha")


@pytest.fixture
def ledger(conn: Connection[Any]) -> Iterator[Ledger]:
    ledger = Ledger(conn)
    prepare(ledger)
    yield ledger
    assert_sound(ledger)


def say(ledger: Ledger, state: str, **more: Any) -> None:
    """A second later Stripe says that a subscription is in this state."""
    ledger.now += SECOND
    assert ledger.tell("customer.subscription.updated", subscription(**{**SAYS[state], **more})) == "applied"


def history(ledger: Ledger) -> list[tuple[Any, ...]]:
    """The moves, the oldest first, and whether each was a surprise."""
    rows = ledger.table("subscription_history", "true order by history_id")
    return [(row.from_state, row.to_state, row.unexpected) for row in rows]


def state(ledger: Ledger) -> Any:
    """How alpha's subscription stands."""
    return ledger.get_subscription_state("alpha")


# Every state and every move ------------------------------------------------------------------------------------------


def advance(ledger: Ledger, to_state: str) -> None:
    """Move the only subscription by the one function that moves any."""
    with ours(), ledger.conn.transaction(), ledger.as_owner():
        ledger.query("select credits._advance(s, %s, 'test') from credits.subscriptions s", to_state)


def moves(ledger: Ledger) -> tuple[list[str], dict[tuple[str, str], str]]:
    """All states, and the effect of each move that is foreseen, from the rows."""
    states = [row.state for row in ledger.table("subscription_states")]
    return states, {(row.from_state, row.to_state): row.effect for row in ledger.table("subscription_transitions")}


@pytest.mark.parametrize("source", ["stripe", "internal"])
def test_every_move_from_every_state_is_foreseen_followed_or_refused(ledger: Ledger, source: str) -> None:
    if source == "stripe":
        ledger.tell("customer.subscription.created", subscription(status="active"))
    else:
        ledger.change_plan("alpha", "free")
    with ledger.conn.transaction(force_rollback=True):  # what hands change, the audit finds
        ledger.change("delete from credits.subscription_history; delete from credits.notifications")
        states, foreseen = moves(ledger)
        for before, after in product(states, states):
            with ledger.conn.transaction(force_rollback=True):
                ledger.change("update credits.subscriptions set state = %s", before)
                if before == after:
                    with ledger.unchanged():
                        advance(ledger, after)
                elif (before, after) in foreseen:
                    advance(ledger, after)
                    assert history(ledger) == [(before, after, False)]
                    (heard,) = ledger.table("notifications")
                    assert (heard.account_id, heard.data["from"]) == ("alpha", before)
                elif source == "stripe":
                    advance(ledger, after)
                    assert history(ledger) == [(before, after, True)]
                    assert ledger.table("notifications") == []
                else:
                    with ledger.unchanged(), refused(409, "illegal_transition", **{"from": before, "to": after}):
                        advance(ledger, after)
                    continue
                (row,) = ledger.table("subscriptions")
                assert (row.state, row.past_due_at is not None) == (after, after == "past_due" != before)


def test_the_effect_of_every_move_exists(ledger: Ledger) -> None:
    _, foreseen = moves(ledger)
    with ledger.as_owner():
        for effect in set(foreseen.values()):
            (row,) = ledger.query(
                "select to_regprocedure(%s) as name", f"credits.{effect}(credits.subscriptions, text)"
            )
            assert row.name, effect


def test_the_rules_of_the_house_know_an_effect_that_does_not_exist(ledger: Ledger) -> None:
    ledger.change("update credits.subscription_transitions set effect = '_nobody' where from_state = 'none'")
    with ledger.as_owner():
        assert ledger.query("select from credits.house_rule_violations")


def test_a_hand_made_history_tells_of_legal_moves_only(ledger: Ledger) -> None:
    say(ledger, "active")
    states, foreseen = moves(ledger)
    insert = (
        "insert into credits.subscription_history "
        "(account_id, subscription_id, from_state, to_state, unexpected, created_at) "
        "values ('alpha', 'sub_1', %s, %s, %s, credits.now())"
    )
    with ledger.conn.transaction(force_rollback=True):
        for before, after in product(states, states):
            if before == after or (before, after) in foreseen:
                ledger.change(insert, before, after, False)
            else:
                with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught, ledger.conn.transaction():
                    ledger.change(insert, before, after, False)
                assert caught.value.diag.constraint_name == "history_only_legal_moves"
                ledger.change(insert, before, after, True)
        for wrong in ("napping", ""):
            with pytest.raises(psycopg.errors.ForeignKeyViolation), ledger.conn.transaction():
                ledger.change(insert, "active", wrong, True)


def test_stripe_is_followed_from_every_state_to_every_other(ledger: Ledger) -> None:
    _, foreseen = moves(ledger)
    for before, after in product(SAYS, SAYS):
        with ledger.conn.transaction(force_rollback=True):
            say(ledger, before)
            say(ledger, after)
            end = "canceled" if before == "canceled" else after  # which nothing ever leaves
            row = state(ledger)
            assert (row.state, row.status, row.source) == (end, SAYS[end]["status"], "stripe")
            made = [("none", before), *([(before, after)] if end != before else [])]
            assert history(ledger) == [(*move, move not in foreseen) for move in made]
            allowed = ledger.table("subscription_states", "state = %s", end)[0]
            assert (row.may_spend, row.may_receive) == (allowed.may_spend, allowed.may_receive)


def test_a_repeated_word_is_no_move(ledger: Ledger) -> None:
    for _ in range(3):
        say(ledger, "active")
    say(ledger, "active", quantity=2)
    assert history(ledger) == [("none", "active", False)]
    (moved,) = ledger.table("subscription_history")
    assert (moved.plan, moved.cause, moved.account_id) == ("basic", "key-1", "alpha")


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({"status": "incomplete_expired"}, "canceled"),
        ({"status": "active", "ended_at": int(NOON.timestamp())}, "canceled"),
        ({"status": "active", "cancel_at": int((NOON + 9 * DAY).timestamp())}, "canceling"),
        ({"status": "trialing", "cancel_at_period_end": True}, "trialing"),
        ({"status": "brand_new"}, "none"),
    ],
)
def test_other_words_of_stripe_become_states_of_ours(ledger: Ledger, says: dict[str, Any], expected: str) -> None:
    ledger.tell("customer.subscription.created", subscription(**says))
    assert (state(ledger).state, state(ledger).status) == (expected, says["status"])
    if "cancel_at" in says:
        assert state(ledger).cancel_at == NOON + 9 * DAY


def test_words_that_come_at_once_end_with_the_last_one(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)
        start = int(NOON.timestamp())
        words = ["active", "past_due", "unpaid", "active", "paused", "trialing", "active", "canceling"] * 2
        payloads = [
            told(f"evt_{n}", "customer.subscription.updated", subscription(**SAYS[word], rank=n), created=start + n)
            for n, word in enumerate(words)
        ]
        results = together(
            database, [partial(Ledger.receive_stripe_event, endpoint="default", payload=one) for one in payloads]
        )
        assert {result.outcome for result in results} == {"applied"}
        assert (state(ledger).state, ledger.table("stripe_objects", "kind = 'subscription'")[0].as_of) == (
            "canceling", start + 15,
        )  # fmt: skip
        made = history(ledger)
        assert made[-1][1] == "canceling"
        assert [move[0] for move in made[1:]] == [move[1] for move in made[:-1]]
        assert_sound(ledger)


# What a state allows -------------------------------------------------------------------------------------------------


def test_the_state_of_an_account_shows_all_that_is_known(ledger: Ledger) -> None:
    end = NOON + 9 * DAY
    say(ledger, "trialing", trial_end=int(end.timestamp()), days=9)
    row = state(ledger)
    assert (row.account_id, row.subscription_id, row.source, row.plan) == ("alpha", "sub_1", "stripe", "basic")
    assert (row.period_start, row.period_end, row.trial_end) == (NOON, end, end)
    assert (row.may_spend, row.may_receive, row.cancel_at, row.pending_plan, row.pending_at) == (
        True, True, None, None, None,
    )  # fmt: skip
    assert (row.as_of, row.stale, row.grace_until) == (ledger.now, False, None)
    say(ledger, "canceling", days=9)
    assert state(ledger).cancel_at == end


def test_an_account_that_never_subscribed_may_spend(ledger: Ledger) -> None:
    row = state(ledger)
    assert (row.state, row.may_spend, row.may_receive, row.subscription_id, row.stale) == (
        "none", True, False, None, False,
    )  # fmt: skip
    with refused(404, "account_not_found"):
        ledger.get_subscription_state("nobody")


def test_past_due_may_spend_until_the_grace_is_over(ledger: Ledger) -> None:
    say(ledger, "active")
    say(ledger, "past_due")
    since = ledger.now
    assert (state(ledger).may_spend, state(ledger).may_receive, state(ledger).grace_until) == (
        True, False, since + 7 * DAY,
    )  # fmt: skip
    ledger.now = since + 3 * DAY
    say(ledger, "past_due", attempt=2)
    ledger.now = since + 7 * DAY - TICK
    assert state(ledger).may_spend
    ledger.now = since + 7 * DAY
    assert not state(ledger).may_spend
    ledger.change("update credits.settings set value = %s where name = 'past_due_grace'", Jsonb("10 days"))
    assert (state(ledger).may_spend, state(ledger).grace_until) == (True, since + 10 * DAY)
    say(ledger, "active")
    assert (state(ledger).may_spend, state(ledger).grace_until) == (True, None)
    say(ledger, "past_due")
    assert state(ledger).grace_until == ledger.now + 10 * DAY


def test_the_grace_is_the_same_in_every_session(ledger: Ledger) -> None:
    ledger.now = datetime(2030, 3, 28, 12, tzinfo=UTC)  # the Thursday before Berlin's clocks are put forward
    say(ledger, "active")
    say(ledger, "past_due")
    since = ledger.now
    ledger.now = since + 7 * DAY - TICK
    for zone in ("Europe/Berlin", "UTC"):
        ledger.conn.execute("select set_config('timezone', %s, true)", [zone])
        assert (state(ledger).may_spend, state(ledger).grace_until) == (True, since + 7 * DAY)


def delivered(ledger: Ledger, words: list[tuple[str, timedelta]], order: tuple[int, ...]) -> None:
    """What Stripe said at some moments, in an order of its own."""
    for n in order:
        word, after = words[n]
        payload = told(
            f"evt_{n}", "customer.subscription.updated", subscription(**SAYS[word], rank=n),
            created=int((NOON + after).timestamp()),
        )  # fmt: skip
        assert ledger.receive_stripe_event("default", payload).outcome == "applied"


@pytest.mark.parametrize(
    ("words", "grace_until"),
    [
        ([("active", 0 * DAY), ("past_due", 1 * DAY), ("past_due", 3 * DAY)], NOON + 8 * DAY),
        ([("past_due", 1 * DAY), ("past_due", 3 * DAY), ("past_due", 5 * DAY)], NOON + 8 * DAY),
        ([("past_due", 1 * DAY), ("active", 3 * DAY), ("past_due", 30 * DAY)], NOON + 37 * DAY),
        ([("past_due", 1 * DAY), ("active", 3 * DAY), ("past_due", 30 * DAY), ("past_due", 33 * DAY)], NOON + 37 * DAY),
        ([("past_due", 1 * DAY), ("unpaid", 3 * DAY), ("active", 9 * DAY)], None),
    ],
)
def test_the_grace_counts_from_the_first_word_of_it_in_any_order(
    ledger: Ledger, words: list[tuple[str, timedelta]], grace_until: Any
) -> None:
    ledger.now = NOON + 34 * DAY
    for order in permutations(range(len(words))):
        with ledger.conn.transaction(force_rollback=True):
            delivered(ledger, words, order)
            assert (state(ledger).state, state(ledger).grace_until) == (words[-1][0], grace_until), order


def test_a_paused_collection_stops_what_comes_and_not_what_is_spent(ledger: Ledger) -> None:
    say(ledger, "active", pause_collection={"behavior": "void"})
    assert (state(ledger).state, state(ledger).may_spend, state(ledger).may_receive) == ("active", True, False)
    say(ledger, "active", pause_collection=None)
    assert state(ledger).may_receive


def test_what_stripe_said_grows_stale(ledger: Ledger) -> None:
    say(ledger, "active")
    said = ledger.now
    ledger.now = said + 5 * MINUTE
    assert (state(ledger).stale, state(ledger).as_of) == (False, said)
    ledger.now += SECOND
    assert (state(ledger).stale, state(ledger).as_of) == (True, said)
    say(ledger, "active")
    assert not state(ledger).stale
    say(ledger, "canceled")
    ledger.now += DAY
    assert not state(ledger).stale  # it can never change again


def test_an_old_word_that_comes_late_is_stale(ledger: Ledger) -> None:
    ledger.now += HOUR
    delivered(ledger, [("active", timedelta(0))], (0,))
    assert (state(ledger).as_of, state(ledger).stale) == (NOON, True)
    ledger.now += HOUR
    ledger.replay_stripe_event("evt_0")
    assert (state(ledger).as_of, state(ledger).stale) == (NOON, True)


def test_a_plan_of_our_own_is_never_stale(ledger: Ledger) -> None:
    ledger.change_plan("alpha", "free")
    ledger.now += DAY
    assert (state(ledger).stale, state(ledger).as_of) == (False, None)


# Several of them -----------------------------------------------------------------------------------------------------


def plan(ledger: Ledger) -> Any:
    """The plan that stands at the account."""
    return ledger.table("accounts", "account_id = 'alpha'")[0].plan


def test_of_two_subscriptions_the_more_alive_one_speaks_whichever_came_first(ledger: Ledger) -> None:
    ranks = {row.state: row.rank for row in ledger.table("subscription_states")}
    for first, second in product(SAYS, SAYS):
        if first == second:
            continue
        with ledger.conn.transaction(force_rollback=True):
            say(ledger, first)
            say(ledger, second, subscription_id="sub_2", price="price_pro")
            leads = min(first, second, key=ranks.__getitem__)
            expected = ("sub_1", "basic") if leads == first else ("sub_2", "pro")
            row = state(ledger)
            assert (row.state, row.subscription_id, row.plan) == (leads, *expected), (first, second)
            assert plan(ledger) == (None if leads == "canceled" else expected[1])


def test_beside_a_plan_of_our_own_a_subscription_of_stripe_speaks_while_it_is_of_use(ledger: Ledger) -> None:
    ledger.change_plan("alpha", "free")
    for word in SAYS:
        with ledger.conn.transaction(force_rollback=True):
            say(ledger, word)
            own = word in {"incomplete", "canceled"}
            assert (state(ledger).source, state(ledger).plan) == (("internal", "free") if own else ("stripe", "basic"))
            assert plan(ledger) == state(ledger).plan


def test_the_plan_of_the_account_follows_its_subscriptions(ledger: Ledger) -> None:
    assert plan(ledger) is None
    say(ledger, "active")
    assert plan(ledger) == "basic"
    say(ledger, "active", price="price_pro")
    assert plan(ledger) == "pro"
    say(ledger, "active", subscription_id="sub_2")
    say(ledger, "canceled", price="price_pro")
    assert plan(ledger) == "basic"
    say(ledger, "past_due", subscription_id="sub_2")
    assert plan(ledger) == "basic"
    say(ledger, "canceled", subscription_id="sub_2")
    assert (plan(ledger), ledger.get_balance("alpha").plan, state(ledger).state) == (None, None, "canceled")
    say(ledger, "active", subscription_id="sub_3", price="price_unheard_of")
    assert (plan(ledger), state(ledger).state) == (None, "active")


def test_a_subscription_stays_with_the_account_that_it_began_with(ledger: Ledger) -> None:
    ledger.open("beta")
    say(ledger, "active")
    ledger.now += SECOND
    stolen = subscription(status="past_due", metadata={"account_id": "beta"})
    assert ledger.tell("customer.subscription.updated", stolen, "evt_1") == "parked"
    assert ledger.event("evt_1").reason == "customer_of_another_account"
    assert (state(ledger).state, ledger.get_subscription_state("beta").state) == ("active", "none")
