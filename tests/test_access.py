"""Who may use what: every gate in its order, for a look as for the use; every combination of a catalogue."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
from client import CreditsError
from ledger_support import DAY, NOON, Ledger, assert_sound, refused
from psycopg import Connection
from psycopg.types.json import Jsonb

Json = dict[str, Any]


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    return Ledger(conn)


def apply(ledger: Ledger, catalog: Json) -> None:
    """Put a catalogue in force."""
    ledger.rows("apply_catalog", catalog=Jsonb(catalog))


def operate(ledger: Ledger, text: str, *parameters: Any) -> None:
    """Change what a document cannot say, as a hand in the tables would."""
    ledger.change(text, *parameters)
    with ledger.as_owner():
        ledger.query("select credits._work_out_offers()")


def bring(ledger: Ledger, change: str, *parameters: Any) -> None:
    """Bring alpha's subscription into a state, as Stripe would."""
    ledger.change(f"update credits.subscriptions s set {change}", *parameters)
    with ledger.as_owner():
        ledger.query("select credits._refresh_plan('alpha')")


# Every combination ---------------------------------------------------------------------------------------------------

CAPABILITIES = [
    "outline", "chapter", "enhance", "summary", "title", "cover", "image", "speech", "video", "chat", "code", "search",
]  # fmt: skip
QUALITIES = ["draft", "good", "best"]
MODELS = ["tiny", "small", "medium", "large", "huge", "painter", "speaker"]
WORDS = {"outline", "chapter", "enhance", "summary", "title", "chat", "code"}

# What each plan may use, apart from the catalogue's form: plan, capability, quality, models with the best one first.
TEXT = {"draft": ["tiny"], "good": ["small", "tiny"], "best": ["large", "medium"]}
ALLOWED: dict[str, dict[str, dict[str, list[str]]]] = {
    "free": {name: {"draft": ["tiny"]} for name in ("outline", "title", "chat")} | {"search": {}},
    "writer": {name: {"draft": ["tiny"], "good": ["small"]} for name in sorted(WORDS)} | {"search": {}},
    "studio": dict.fromkeys(("outline", "chapter", "chat", "title"), TEXT)
    | {"cover": {"good": ["painter"]}, "image": {"good": ["painter"], "best": ["painter"]}, "search": {}},
    "house": {name: {"best": ["huge"]} for name in ("chapter", "code")}
    | {
        "speech": {"draft": ["speaker"], "good": ["speaker"]},
        "image": {"good": ["painter"], "best": ["painter"]},
        "video": {"best": ["painter", "speaker"]},
        "search": {},
        "cover": {},
    },
}


def catalogue() -> Json:
    """The same as a document."""
    return {
        "capabilities": {
            name: {"name": name.title(), "unit": "words" if name in WORDS else "unit"} for name in CAPABILITIES
        },
        "quality_levels": {name: {"name": name, "display_order": place} for place, name in enumerate(QUALITIES)},
        "models": {name: {"name": name} for name in MODELS},
        "plans": {
            plan: {
                "name": plan.title(),
                "capabilities": {name: {"qualities": qualities} for name, qualities in allowed.items()},
            }
            for plan, allowed in ALLOWED.items()
        },
        "rates": [
            {"capability": name, "price": {"credits": 1, "qualities": {"best": 3}, "models": {"huge": 2}}}
            for name in CAPABILITIES
        ],
    }


def expected(plan: str, capability: str, quality: str | None, model: str | None) -> tuple[Any, ...]:
    """The gate that refuses, or none, with the quality and the model that are chosen."""
    if capability not in ALLOWED[plan]:
        return "plan", None, None
    offered = ALLOWED[plan][capability]
    if not offered:
        return ("quality" if quality else "model", None, None) if quality or model else (None, None, None)
    if quality and quality not in offered:
        return "quality", None, None
    for level in [quality] if quality else QUALITIES:
        fitting = [one for one in offered.get(level or "", []) if model in {None, one}]
        if fitting:
            return None, level, fitting[0]
    return "model", None, None


def general_way(ledger: Ledger, *asked: str | None) -> tuple[Any, ...]:
    """The same answer without the shortcut by offers."""
    with ledger.as_owner():
        (row,) = ledger.query(
            "select d.* from credits._decide(credits._balance(%s), row(%s, 10, null, %s, %s, null, null), %s) d",
            *asked,
            asked[0],
        )
    return (row.gate, row.status, row.code, row.capability, row.quality, row.model, row.amount, row.available)


def test_every_combination_of_a_catalogue(ledger: Ledger) -> None:
    mappings = sum(len(models) for plan in ALLOWED.values() for levels in plan.values() for models in levels.values())
    assert (len(ALLOWED), len(CAPABILITIES), len(QUALITIES), len(MODELS), mappings) == (4, 12, 3, 7, 48)
    apply(ledger, catalogue())
    for plan in ALLOWED:
        ledger.open_account(plan, plan=plan)
        ledger.grant(100, plan)
    asked = list(product(ALLOWED, CAPABILITIES, [None, *QUALITIES], [None, *MODELS]))
    answers = {}
    for plan, capability, quality, model in asked:
        row = ledger.check_access(plan, capability, 10, quality=quality, model=model)
        answers[plan, capability, quality, model] = (row.gate, row.quality, row.model)
        if row.allowed:
            assert row.amount == 10 * (3 if row.quality == "best" else 1) * (2 if row.model == "huge" else 1)
        if row.allowed:
            assert general_way(ledger, plan, capability, quality, model) == (*row[2:8], row.amount, row.available)
    wrong = {one: (answers[one], expected(*one)) for one in asked if answers[one] != expected(*one)}
    assert not wrong
    assert sum(gate is None for gate, *_ in answers.values()) > 100


# Gate after gate -----------------------------------------------------------------------------------------------------

GATES = [
    "account", "subscription", "plan", "quality", "model", "member", "rate_limit", "monthly_cap", "member_limit",
    "balance",
]  # fmt: skip
CODES = {
    "account": (423, "account_frozen"),
    "subscription": (403, "subscription_inactive"),
    "plan": (403, "plan_required"),
    "quality": (403, "quality_not_in_plan"),
    "model": (403, "model_not_in_plan"),
    "member": (403, "forbidden"),
    "rate_limit": (429, "rate_limited"),
    "monthly_cap": (429, "monthly_cap_reached"),
    "member_limit": (429, "member_limit_reached"),
    "balance": (402, "insufficient_credits"),
}


def gated(**changes: Any) -> Json:
    """A catalogue whose plan small lets nothing pass, as far as changes do not open it."""
    plan = {
        "name": "Small",
        "capabilities": {
            "chapter": {
                "qualities": {"good": ["small"]},
                "limits": [{"calls": 0, "per": "minute"}, {"credits": 1, "per": "month"}],
            }
        },
    }
    return {
        "capabilities": {name: {"name": name, "unit": "words"} for name in ("chapter", "title")},
        "quality_levels": {name: {"name": name} for name in ("good", "best")},
        "models": {name: {"name": name} for name in ("small", "large")},
        "plans": {"small": {**plan, **changes}, "other": plan},
        "rates": [{"capability": name, "price": {"credits": 1}} for name in ("chapter", "title")],
    }


def opened(gate: int) -> Callable[[Ledger], None]:
    """What an operator does to open a gate."""
    title: Json = {"limits": [{"calls": 0, "per": "minute"}, {"credits": 1, "per": "month"}]}
    steps: dict[str, Callable[[Ledger], Any]] = {
        "account": lambda ledger: ledger.unfreeze_account("alpha"),
        "subscription": lambda ledger: bring(ledger, "state = 'active'"),
        "plan": lambda ledger: apply(
            ledger, gated(capabilities={"chapter": {}, "title": {**title, "qualities": {"good": ["small"]}}})
        ),
        "quality": lambda ledger: apply(
            ledger,
            gated(capabilities={"title": {**title, "qualities": {"good": ["small"], "best": ["small"]}}}),
        ),
        "model": lambda ledger: apply(
            ledger, gated(capabilities={"title": {**title, "qualities": {"best": ["small", "large"]}}})
        ),
        "member": lambda ledger: ledger.row(
            "set_member", account_id="alpha", member_id="m", role="member", monthly_limit=1
        ),
        "rate_limit": lambda ledger: apply(
            ledger,
            gated(capabilities={
                "title": {"qualities": {"best": ["large"]}, "limits": [{"credits": 1, "per": "month"}]}
            }),
        ),
        "monthly_cap": lambda ledger: apply(
            ledger, gated(capabilities={"title": {"qualities": {"best": ["large"]}}})
        ),
        "member_limit": lambda ledger: ledger.row(
            "set_member", account_id="alpha", member_id="m", role="member", monthly_limit=100
        ),
        "balance": lambda ledger: ledger.grant(5),
    }  # fmt: skip
    return steps[GATES[gate]]


def asked(ledger: Ledger, verb: str, **more: Any) -> Any:
    """A use of ten titles by a member, or a look at it."""
    arguments = {"quality": "best", "model": "large", "member_id": "m", **more}
    return getattr(ledger, verb)("alpha", "title", 10, **arguments)


def test_gates_refuse_in_their_order_and_a_look_says_what_the_use_says(ledger: Ledger) -> None:
    apply(ledger, gated())
    ledger.open_account("alpha", kind="organization", plan="small")
    ledger.grant(5)
    bring(ledger, "state = 'paused'")
    ledger.freeze_account("alpha")
    for place, gate in enumerate(GATES):
        look = asked(ledger, "check_access")
        assert (look.allowed, look.gate, look.status, look.code) == (False, gate, *CODES[gate])
        with ledger.unchanged(), pytest.raises(CreditsError) as caught:
            asked(ledger, "authorize_usage", usage_id="u")
        assert (caught.value.status, caught.value.code) == CODES[gate]
        assert caught.value.detail == look.detail
        assert caught.value.hint
        opened(place)(ledger)
    look = asked(ledger, "check_access")
    assert (look.allowed, look.gate, look.amount, look.available) == (True, None, 10, 10)
    usage = asked(ledger, "authorize_usage", usage_id="u")
    assert (usage.quality, usage.model, usage.amount, usage.available) == ("best", "large", 10, 0)
    assert_sound(ledger)


def test_a_refusal_says_what_is_missing(ledger: Ledger) -> None:
    apply(ledger, catalogue())
    ledger.open_account("alpha", plan="free")
    ledger.grant(5)
    with refused(403, "plan_required", capability="image", plan="free", plans=["house", "studio"]):
        ledger.authorize_usage("alpha", "image", 1, usage_id="u")
    with refused(403, "quality_not_in_plan", quality="best", qualities=["draft"]):
        ledger.authorize_usage("alpha", "chat", 1, quality="best", usage_id="u")
    with refused(403, "model_not_in_plan", model="huge", models=["tiny"]):
        ledger.authorize_usage("alpha", "chat", 1, model="huge", usage_id="u")
    with refused(402, "insufficient_credits", required=6, available=5):
        ledger.authorize_usage("alpha", "chat", 6, usage_id="u")


@pytest.mark.parametrize("verb", ["check_access", "authorize_usage", "quote"])
def test_what_the_catalogue_does_not_know_is_an_error(ledger: Ledger, verb: str) -> None:
    apply(ledger, catalogue())
    ledger.open_account("alpha", plan="free")
    more = {"usage_id": "u"} if verb == "authorize_usage" else {}
    with refused(404, "capability_not_found", capability="dance"):
        getattr(ledger, verb)("alpha", "dance", 1, **more)
    with refused(404, "account_not_found"):
        getattr(ledger, verb)("nobody", "chat", 1, **more)
    with refused(404, "capability_not_found"):
        getattr(ledger, verb)("alpha", None, 1, **more)
    operate(ledger, "update credits.rates r set valid_until = %s", NOON)
    with refused(404, "rate_not_found", capability="chat"):
        getattr(ledger, verb)("alpha", "chat", 1, **more)


@pytest.mark.parametrize("price", [{"flat": 1}, {"credits": 1}])
def test_an_empty_code_is_none_that_there_is(ledger: Ledger, price: Json) -> None:
    document = catalogue()
    document["rates"] = [{"capability": name, "price": price} for name in CAPABILITIES]
    apply(ledger, document)
    ledger.open_account("alpha", plan="free")
    ledger.grant(10)
    for what in ("quality", "model"):
        look = ledger.check_access("alpha", "chat", 1, **{what: ""})
        assert (look.gate, look.code) == (what, f"{what}_not_in_plan")
        with refused(403, look.code):
            ledger.authorize_usage("alpha", "chat", 1, usage_id="u", **{what: ""})


def test_units_that_a_flat_price_does_not_know_are_refused_by_a_look_too(ledger: Ledger) -> None:
    document = catalogue()
    document["rates"] = [
        {"capability": name, "price": {"lines": [{"flat": 1, "unit": "pages"}, {"flat": 2, "unit": unit}]}}
        for name, unit in {**dict.fromkeys(CAPABILITIES, "pages"), "title": "words"}.items()
    ]
    apply(ledger, document)
    ledger.open_account("alpha", plan="free")
    ledger.grant(10)
    for verb in (ledger.check_access, partial(ledger.authorize_usage, usage_id="a"), ledger.quote):
        with refused(400, "invalid_request", argument="units", unknown=["words"]):
            verb("alpha", "chat", 5)
    for number, (capability, units) in enumerate([("chat", None), ("title", None), ("title", 5)]):
        assert ledger.check_access("alpha", capability, units).amount == 3
        assert ledger.authorize_usage("alpha", capability, units, usage_id=f"b{number}").amount == 3
    assert_sound(ledger)


def test_an_account_without_a_plan_has_the_default_one(ledger: Ledger) -> None:
    apply(ledger, catalogue())
    ledger.open("alpha", 10)
    assert ledger.check_access("alpha", "chat", 1).gate == "plan"
    operate(ledger, "update credits.plans p set is_default = true where p.code = 'free'")
    row = ledger.check_access("alpha", "chat", 1)
    assert (row.allowed, row.plan, row.model) == (True, "free", "tiny")
    assert ledger.get_balance("alpha").plan is None
    ledger.change_plan("alpha", "studio", at="now")
    assert ledger.check_access("alpha", "chat", 1, quality="best").model == "large"


def test_what_is_not_active_is_not_chosen(ledger: Ledger) -> None:
    apply(ledger, catalogue())
    ledger.open_account("alpha", plan="studio")
    ledger.grant(1000)
    operate(ledger, "update credits.models m set active = false where m.code = 'large'")
    assert ledger.check_access("alpha", "chat", 1, quality="best").model == "medium"
    assert ledger.check_access("alpha", "chat", 1, model="large").gate == "model"
    operate(ledger, "update credits.quality_levels q set active = false where q.code = 'draft'")
    assert ledger.check_access("alpha", "chat", 1).quality == "good"
    assert ledger.check_access("alpha", "chat", 1, quality="draft").gate == "quality"
    operate(ledger, "update credits.capabilities c set active = false where c.code = 'chat'")
    with refused(404, "capability_not_found"):
        ledger.check_access("alpha", "chat", 1)


def test_a_quality_of_the_plan_is_for_capabilities_without_their_own(ledger: Ledger) -> None:
    document = catalogue()
    document["plans"]["free"] = {
        "name": "Free", "qualities": {"good": ["small"]},
        "capabilities": {"chat": {}, "code": {"qualities": {"best": ["huge"]}}},
    }  # fmt: skip
    apply(ledger, document)
    ledger.open_account("alpha", plan="free")
    ledger.grant(1000)
    assert ledger.check_access("alpha", "chat", 1)[6:8] == ("good", "small")
    assert ledger.check_access("alpha", "code", 1)[6:8] == ("best", "huge")
    assert ledger.check_access("alpha", "code", 1, quality="good").gate == "quality"


@pytest.mark.parametrize(
    ("status", "allowed"),
    [
        ("active", True),
        ("trialing", True),
        ("incomplete", True),
        ("unpaid", False),
        ("paused", False),
        ("canceled", True),
    ],
)
def test_the_state_of_the_subscription_is_asked(ledger: Ledger, status: str, allowed: bool) -> None:
    apply(ledger, catalogue())
    ledger.open_account("alpha", plan="free")
    ledger.grant(10)
    bring(ledger, "state = %s", status)
    operate(ledger, "update credits.plans p set is_default = true where p.code = 'free'")
    assert ledger.check_access("alpha", "chat", 1).allowed is allowed


def test_grace_ends_by_itself(ledger: Ledger) -> None:
    apply(ledger, catalogue())
    ledger.open_account("alpha", plan="free")
    ledger.grant(10)
    bring(ledger, "state = 'past_due', past_due_at = %s", NOON)
    assert ledger.check_access("alpha", "chat", 1).allowed
    ledger.now += 30 * DAY
    assert ledger.check_access("alpha", "chat", 1).gate == "subscription"


def test_credits_that_are_scoped_pay_for_their_capabilities_only(ledger: Ledger) -> None:
    apply(ledger, catalogue())
    ledger.open_account("alpha", plan="studio")
    ledger.grant(50, scope=["image"])
    assert ledger.check_access("alpha", "image", 40)[9:11] == (40, 50)
    assert ledger.check_access("alpha", "chat", 1).gate == "balance"
    assert ledger.check_access("alpha", "chat", 1).available == 0
    ledger.authorize_usage("alpha", "image", 40, usage_id="u")
    with refused(402, "insufficient_credits", required=11, available=10):
        ledger.authorize_usage("alpha", "image", 11, usage_id="v")
    assert ledger.settle_usage("alpha", "u", 30).charged == 30
    assert_sound(ledger)


def test_what_has_fallen_due_is_seen_before_it_is_booked(ledger: Ledger) -> None:
    apply(ledger, catalogue())
    ledger.open_account("alpha", plan="free")
    ledger.grant(10, expires_at=NOON + DAY)
    ledger.grant(7, effective_at=NOON + DAY, expires_at=NOON + 2 * DAY)
    for at, available in ((NOON, 10), (NOON + DAY, 7), (NOON + 2 * DAY, 0)):
        ledger.now = at
        assert ledger.check_access("alpha", "chat", 1).available == available
