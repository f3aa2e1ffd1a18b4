"""pgcredits catalog apply, diff, export: lines of problems, exact numbers, documents that read well."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import stop_clock
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_support import DAY, NOON, Ledger, assert_sound, committed
from servers import ONE_ENGINE, Database

from pgcredits import catalog, cli
from pgcredits.catalog import CatalogError

DOCUMENT = """\
# The catalogue of a product that writes books.
capabilities:
  chapter: {name: Chapter, unit: words, display_order: 2}
  outline: {display_order: 1}
quality_levels:
  draft: {name: "no", display_order: 1}
  best: {name: "1e3", display_order: 2}
models: {small: , large: }
packages:
  bulk: {name: Bulk, credits: 123456789012.123456, price: 1, currency: usd}
  starter: {name: "Füller: a", description: "two\\nlines", credits: 0.000001, price: 0, currency: usd}
plans:
  pro:
    name: Professional
    monthly_credits: 100
    qualities: {best: [large, small], draft: []}
    capabilities:
      outline:
      chapter:
        limits:
          - {calls: 10, per: minute}
rates:
  - {capability: outline, price: 50}
  - {capability: outline, valid_from: 2100-01-01, price: 60}
  - {capability: chapter, price: 1.50}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit code, what it printed and what it complained about."""
    monkeypatch.setenv("PGCREDITS_DSN", database.dsn)

    def command(*arguments: str, text: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgcredits", "catalog", *arguments])
        if text is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return command


def test_apply_diff_and_export(run: Run, tmp_path: Path) -> None:
    assert run("diff", "-", text=DOCUMENT)[0] == 0
    code, announced, _ = run("diff", "--check", "-", text=DOCUMENT)
    assert code == 1
    code, printed, _ = run("apply", "-", text=DOCUMENT)
    assert (code, printed) == (0, announced)
    assert "added        plans.pro\n" in printed
    assert run("apply", "-", text=DOCUMENT) == (0, "Nothing to change.\n", "")

    file = tmp_path / "catalogue.yaml"
    assert run("export", str(file)) == (0, "", "")
    text = file.read_text()
    assert run("export")[1] == text
    assert run("diff", "--check", str(file)) == (0, "Nothing to change.\n", "")
    assert run("apply", str(file)) == (0, "Nothing to change.\n", "")

    changed = DOCUMENT.replace("monthly_credits: 100", "monthly_credits: 100.10").replace("[large, small]", "[small]")
    changed = changed.replace("price: 50", "price: 51").replace("  starter:", "  other:")
    code, printed, _ = run("apply", "-", text=changed)
    assert code == 0
    assert [line.split(maxsplit=1) for line in printed.splitlines()] == [
        ["added", "packages.other"],
        ["removed", "packages.starter"],
        ["changed", "plans.pro.monthly_credits: 100 -> 100.1"],
        ["changed", "plans.pro.qualities.best: [large, small] -> [small]"],
        ["changed", printed.splitlines()[-1].split(maxsplit=1)[1]],
    ]
    assert re.search(r"rates\.outline: \{.*\} -> \{.*\}$", printed.rstrip())


def test_accounts_get_what_their_plan_says_now(run: Run, database: Database) -> None:
    plans = "plans: {pro: {name: Pro, monthly_credits: 0}}"
    run("apply", "-", text=plans)
    with committed(database) as ledger:
        for name in ("alpha", "beta"):
            ledger.open_account(name, plan="pro")
        code, printed, _ = run("apply", "-", text=plans.replace("0}", "20}"))
        assert (code, printed.splitlines()[-1]) == (0, "Accounts brought to the credits that their plan says now: 2.")
        assert {ledger.available("alpha"), ledger.available("beta")} == {20}
    assert run("apply", "-", text=plans.replace("0}", "20}")) == (0, "Nothing to change.\n", "")


def test_months_that_nobody_has_booked_are_those_of_the_catalogue_that_they_began_under(
    run: Run, database: Database
) -> None:
    """Of three months without a job only the second was there, as a pending grant; the third came with what is new."""
    plans = "plans: {pro: {name: Pro, monthly_credits: 100, rollover: all}, free: {name: Free, monthly_credits: 7}}"
    run("apply", "-", text=plans)
    with database.connect(autocommit=True) as conn:
        ledger = Ledger(conn, at=None)
        with ledger.as_owner():
            stop_clock(conn, NOON)
        for name in ("alpha", "beta"):
            ledger.open_account(name, plan="pro")
        ledger.change_plan("beta", "free", at="period_end")
        ledger.freeze_account("beta")
        with ledger.as_owner():
            stop_clock(conn, NOON + 70 * DAY)
        assert (ledger.available("alpha"), ledger.available("beta")) == (300, 7)
        code, printed, _ = run("apply", "-", text=plans.replace("100", "1000").replace("7", "70"))
        assert (code, printed.splitlines()[-1]) == (0, "Accounts brought to the credits that their plan says now: 2.")
        assert (ledger.available("alpha"), ledger.available("beta")) == (300, 7)
        with ledger.as_owner():
            stop_clock(conn, NOON + 95 * DAY)
        assert (ledger.available("alpha"), ledger.available("beta")) == (1300, 70)
        assert_sound(ledger)


def test_an_export_reads_well(run: Run) -> None:
    run("apply", "-", text=DOCUMENT)
    text = run("export")[1]
    assert [line[:-1] for line in text.splitlines() if re.fullmatch(r"\w+:", line)] == [
        "capabilities", "quality_levels", "models", "packages", "plans", "rates",
    ]  # fmt: skip
    assert text.startswith("capabilities:\n  outline:\n    name: outline\n    display_order: 1\n  chapter:\n")
    assert "  pro:\n    name: Professional\n    monthly_credits: 100\n    qualities:\n      draft: []\n" in text
    assert (
        "      best:\n        - large\n        - small\n    capabilities:\n      outline: {}\n      chapter:\n" in text
    )
    assert "    credits: 0.000001\n" in text
    assert "    credits: 123456789012.123456\n" in text
    assert "name: 'no'\n" in text
    assert "name: '1e3'\n" in text
    assert "name: 'Füller: a'\n" in text
    assert "valid_from: '2100-01-01T00:00:00Z'\n" in text
    assert not re.search(r"[&*]\w|!!", text)


PROBLEMS = {
    ("monthly_credits", "monthly_creditz"): "15: plans.pro.monthly_creditz: unknown key; did you mean monthly_credits?",
    ("per: minute", "per: minuet"): (
        "21: plans.pro.capabilities.chapter.limits[0].per: must be one of minute, hour, day, month; "
        "did you mean minute?"
    ),
    ("    name: Professional\n", ""): "13: plans.pro: name is required",
    ("[large, small]", "[large, tiny]"): "16: plans.pro.qualities.best[1]: there is no model tiny",
    ("price: 60", "price: free"): "24: rates[1].price: ",
    ("  - {capability: chapter, price: 1.50}\n", ""): (
        "19: plans.pro.capabilities.chapter: has no rate in force for best by large, best by small, draft"
    ),
    ("price: 0,", "price: 010,"): "11: packages.starter.price: must be a whole number from 0, in the minor unit",
}


@ONE_ENGINE
def test_problems_have_their_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "catalogue.yaml"
    for (old, new), expected in PROBLEMS.items():
        file.write_text(DOCUMENT.replace(old, new))
        code, printed, complaint = run("apply", str(file))
        assert (code, printed) == (1, "")
        assert complaint.startswith(f"{file}:{expected}"), complaint
    text = DOCUMENT
    for old, new in PROBLEMS:
        text = text.replace(old, new)
    file.write_text(text)
    lines = run("diff", str(file))[2].splitlines()
    assert len(lines) == len(PROBLEMS)
    assert [int(line.removeprefix(f"{file}:").split(":")[0]) for line in lines] == [11, 13, 14, 15, 18, 20, 23]


UNREADABLE = {
    "": "the document is empty",
    "# nothing\n": "the document is empty",
    "a: 1\nb:\n  c: 1\n  c: 2\n": ":4: b.c: is given twice, first in line 3",
    '{"a": 1, "a": 1}': ":1: a: is given twice, first in line 1",
    "a: [1, 2": ":1: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
    "a: &x\n  b: *x\n": ":2: a.b: contains itself",
    "? [a]\n: b\n": ":1: : a key is a text",
    "a\n---\nb\n": ":2: expected a single document in the stream, but found another document",
    "a: \x01": "unacceptable character",
    'a:\n  b: "x\\0"': ":2: a.b: has a character that PostgreSQL cannot hold",
    'a: {"\\0": 1}': ":1: a: has a character that PostgreSQL cannot hold",
    'a: ["\\ud83d"]': ":1: a[0]: has a character that PostgreSQL cannot hold",
    "[" * 600: "is nested too deeply",
}


@pytest.mark.parametrize("text", UNREADABLE, ids=[str(n) for n in range(len(UNREADABLE))])
def test_what_cannot_be_read_is_one_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(CatalogError) as caught:
        catalog.read(str(file))
    assert str(caught.value).startswith(f"{file}:")
    assert UNREADABLE[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, problem in {"none": "cannot be read: No such file", ".": "cannot be read: Is a directory",
                          "latin": "is not a text in UTF-8"}.items():  # fmt: skip
        with pytest.raises(CatalogError, match=problem):
            catalog.read(str(tmp_path / name))
    with pytest.raises(CatalogError, match="cannot be written: No such file"):
        catalog.write(str(tmp_path / "none" / "there"), "")


@ONE_ENGINE
def test_without_the_right_or_a_file_the_process_says_so_in_one_line(database: Database, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pgcredits", "catalog"]
    env = {**os.environ, "PGCREDITS_DSN": f"{database.dsn} options='-c role=credits_user'"}
    for arguments in (["apply", "none.yaml"], ["export"]):
        answer = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False, env=env, cwd=tmp_path
        )
        assert (answer.returncode, answer.stdout) == (1, ""), answer
        assert answer.stderr in (
            "none.yaml: cannot be read: No such file or directory\n",
            (
                "pgcredits: permission denied for schema credits · Log in as a member of credits_service, "
                "or set PGCREDITS_ROLE=credits_service if the login may become it\n"
            ),
        )


def read(text: str, tmp_path: Path) -> Any:
    (tmp_path / "c.yaml").write_text(text)
    return json.loads(catalog.read(str(tmp_path / "c.yaml")).text, parse_float=Decimal)


def test_values_are_what_they_look_like(tmp_path: Path) -> None:
    text = "{n: 0.10, m: 123456789012345678.5, e: 1e3, i: -7, d: 2026-01-01, t: 1:30, o: 010, y: yes, z: ~, b: True,"
    text += " s: '5', u: _1, h: 0x1F, e2: , f: .5, tag: !!str 5, is: !!bool yes, inf: .inf, date: 2026-01-01T00:00:00Z}"
    assert read(text, tmp_path) == {
        "n": Decimal("0.10"), "m": Decimal("123456789012345678.5"), "e": Decimal(1000), "i": -7, "d": "2026-01-01",
        "t": "1:30", "o": "010", "y": "yes", "z": None, "b": True, "s": "5", "u": "_1", "h": "0x1F", "e2": None,
        "f": ".5", "tag": "5", "is": "yes", "inf": ".inf", "date": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    assert read("base: &b [1]\nagain: *b\n", tmp_path) == {"base": [1], "again": [1]}
    assert read('a: "\\ud83d\\ude00"', tmp_path) == {"a": "\U0001f600"}  # as JSON has it
    assert read("1: a\ntrue: b\n", tmp_path) == {"1": "a", "true": "b"}


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    [
        "yes",
        "1e3",
        "0x1",
        "null",
        "~",
        "1:30",
        "2026-01-01",
        "5",
        "-",
        "#",
        "a: b",
        "é\x85",
        "\u2028 a\n\nb ",
        "=",
        "<<",
        ".5",
        "1_0",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.decimals(-(10**9), 10**9, places=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=st.dictionaries(texts, values, min_size=1, max_size=3))
def test_what_is_written_reads_the_same(value: Any) -> None:
    document = catalog.Document("c.yaml")
    root = yaml.compose(catalog._dumped(value), Loader=catalog._Loader)  # noqa: SLF001
    assert root
    assert json.loads(catalog._json(root, (), document, ()), parse_float=Decimal) == value  # noqa: SLF001


@ONE_ENGINE
def test_the_example_of_the_manual_can_be_applied(run: Run) -> None:
    page = (Path(__file__).parents[1] / "docs/catalog.md").read_text()
    (example,) = re.findall(r"```yaml\n(capabilities:.*?)```", page, re.DOTALL)
    code, _, complaint = run("apply", "-", text=example)
    assert (code, complaint) == (0, "")
    assert run("diff", "--check", "-", text=example)[0] == 0
