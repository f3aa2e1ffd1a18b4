"""Deploying: all or nothing, twice, at once, back and forth, with psql alone."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import psycopg
import pytest
from client import Client
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from servers import EVERY_VERSION, ONE_ENGINE, OWNER, Database
from yoyo import get_backend, read_migrations

from pgcredits import migrate
from pgcredits.migrate import HOME, DeployError

ALL = [migration.name for migration in migrate.migrations()]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the files that are deployed, to break."""
    for folder in ("migrations", "sql"):
        shutil.copytree(HOME / folder, tmp_path / folder)
    return tmp_path


def pgcredits(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pgcredits", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@EVERY_VERSION
def test_the_owner_needs_no_superuser(empty_database: Database) -> None:
    with psycopg.connect(empty_database.dsn) as conn:
        rights = conn.execute("select rolname, rolsuper, rolbypassrls from pg_roles where rolname = current_user")
        assert rights.fetchone() == (OWNER, False, False)
    assert migrate.migrate(empty_database.dsn) == ALL


def test_twice_changes_nothing(empty_database: Database) -> None:
    migrate.migrate(empty_database.dsn)
    before = empty_database.dump()
    assert "CREATE TABLE credits." in before
    assert migrate.migrate(empty_database.dsn) == []
    assert empty_database.dump() == before


def test_what_plans_offer_is_what_the_new_version_makes_of_the_catalogue(database: Database) -> None:
    with database.connect("credits_owner") as owner:
        owner.execute(
            "insert into credits.offers"
            " values ('free', 'x', '', '', 'free', null, null, 1, null, 1, 'infinity', false, null, '{}')"
        )
    with database.connect(autocommit=True) as conn:
        assert [finding.invariant for finding in Client(conn).audit()] == ["offers_are_what_plans_say"]
        migrate.migrate(database.dsn)
        assert Client(conn).audit() == []


def test_four_processes_at_once(empty_database: Database) -> None:
    command = [sys.executable, "-m", "pgcredits", "migrate", "--dsn", empty_database.dsn]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    answers = [(process.communicate(timeout=120)[0], process.returncode) for process in running]
    assert [code for _, code in answers] == [0, 0, 0, 0], answers
    assert sorted(text.startswith("Applied: 0001") for text, _ in answers) == [False, False, False, True], answers


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_isolation = 'repeatable read'",
        "default_transaction_isolation = 'serializable'",
        "statement_timeout = '40ms'",
        "lock_timeout = '40ms'",
        "quote_all_identifiers = on",
    ],
)
def test_what_the_database_has_set_for_its_traffic_does_not_count(empty_database: Database, setting: str) -> None:
    with empty_database.admin() as admin:
        admin.execute(f"alter database {empty_database.name} set {setting}".encode())
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(migrate.migrate, [empty_database.dsn] * 2))
    assert sorted(answers) == [[], ALL]


def test_a_killed_deploy_leaves_nothing_behind(empty_database: Database) -> None:
    with psycopg.connect(empty_database.dsn) as other:
        other.execute("select pg_advisory_xact_lock(hashtextextended('pgcredits.deploy', 0))")
        waiting = subprocess.Popen([sys.executable, "-m", "pgcredits", "migrate", "--dsn", empty_database.dsn])
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)  # it waits for us
        waiting.kill()
        waiting.wait()
    assert migrate.migrate(empty_database.dsn) == ALL


USES = """
do $$
declare v_type record;
begin
  for v_type in
    select t.typname from pg_type t join pg_class c on c.oid = t.typrelid
     where t.typnamespace = 'credits'::regnamespace and c.relkind = 'c'
  loop
    execute format('create function credits._earlier_%1$s(x credits.%1$I) returns credits.%1$I'
                   ' language sql as $f$ select x $f$', v_type.typname);
  end loop;
end $$;
"""


@ONE_ENGINE
@pytest.mark.parametrize("known", range(1, len(ALL)))
def test_functions_of_an_earlier_version_are_no_obstacle(empty_database: Database, home: Path, known: int) -> None:
    for path in (home / "sql").glob("*.sql"):
        path.unlink()
    for name in ALL[known:]:
        (home / "migrations" / f"{name}.sql").unlink()
    migrate.migrate(empty_database.dsn, home)
    with empty_database.connect(OWNER) as conn:
        conn.execute("set role credits_owner")
        conn.execute(USES)
        conn.commit()
    assert migrate.migrate(empty_database.dsn) == ALL[known:]


TOLD = """
set role credits_owner;
insert into credits.stripe_endpoints (endpoint, stripe_account) values ('shop', 'acct_1');
insert into credits.stripe_events (event_id, endpoint, type, stripe_account, object_id, status, received_at, payload)
select e.id, 'shop', 'x', e.account, e.about, e.status, now(), '{}'
  from (values ('evt_1', 'acct_1', 'cs_1', 'applied'), ('evt_2', 'acct_1', 'sub_1', 'applied'),
               ('evt_3', null, 'cs_2', 'applied'), ('evt_4', 'acct_1', 'sub_1', 'applied'),
               ('evt_5', 'acct_2', 'sub_2', 'ignored'), ('evt_6', null, 'price_2', 'applied'),
               ('evt_7', null, 'sub_3', 'applied')) e (id, account, about, status);
update credits.stripe_events set status = 'parked', reason = 'price_unknown', waits_for = 'price:price_3'
 where event_id in ('evt_4', 'evt_7');
insert into credits.accounts (account_id) values ('alpha');
insert into credits.packages (code, name, credits, price, currency) values ('p', 'P', 1, 1, 'usd');
insert into credits.stripe_customers (customer_id, account_id, bound_by, created_at)
values ('cus_1', 'alpha', 'evt_1', now()), ('cus_2', 'alpha', 'evt_3', now());
insert into credits.stripe_objects (kind, object_id, snapshot, updated_at)
values ('subscription', 'sub_2', '{"customer": "cus_4"}', now()),
       ('line_items', 'cs_1', '{"customer": "cus_5"}', now()),
       ('subscription', 'sub_1', '{"id": "sub_1", "customer": {"id": "cus_3"}, "latest_invoice": "in_1",
          "default_payment_method": null, "items": {"data": [
            {"price": {"id": "price_1", "product": "prod_1"}}, {"price": {"id": "price_2"}}]}}', now());
insert into credits.stripe_requests (purpose, ref, method, path, params, state, first_sent_at, created_at, run_at)
select r.purpose, r.ref, r.method, '/v1/x', r.params::jsonb, r.state, r.first, now(), now()
  from (values ('retrieve', 'price:price_1', 'get', '{}', 'queued', now()),
               ('retrieve', 'line_items:cs_1', 'get', '{}', 'queued', null),
               ('retrieve', 'price:price_2', 'get', '{}', 'queued', null),
               ('retrieve', 'price:price_3', 'get', '{}', 'queued', now()),
               ('retrieve', 'customer:cus_3', 'get', '{}', 'done', now()),
               ('portal', 'p_1', 'post', '{"customer": "cus_1"}', 'queued', null),
               ('portal', 'p_2', 'post', '{"customer": "cus_1"}', 'queued', now()),
               ('refund', 'r_1', 'post', '{"payment_intent": "pi_1"}', 'queued', null),
               ('change_plan', 'sub_1', 'post', '{}', 'queued', null),
               ('change_plan', 'sub_2', 'post', '{}', 'queued', null)) r (purpose, ref, method, params, state, first);
insert into credits.purchases (account_id, package, quantity, credits, amount, currency, stripe_session_id,
                               stripe_payment_intent_id, created_at)
values ('alpha', 'p', 1, 1, 1, 'usd', 'cs_1', 'pi_1', now()), ('alpha', 'p', 1, 1, 1, 'usd', 'cs_2', 'pi_2', now());
"""


@ONE_ENGINE
def test_what_connected_accounts_told_before_they_were_served_is_known(empty_database: Database, home: Path) -> None:
    for path in (home / "sql").glob("*.sql"):
        path.unlink()
    later = ALL[ALL.index("0024.connect") :]
    for name in later:
        (home / "migrations" / f"{name}.sql").unlink()
    migrate.migrate(empty_database.dsn, home)
    with empty_database.connect(OWNER) as conn:
        conn.execute(TOLD)
        conn.commit()
    assert migrate.migrate(empty_database.dsn) == later
    with empty_database.admin() as admin:
        known = admin.execute("select object_id, stripe_account from credits.stripe_homes order by 1").fetchall()
        moved = admin.execute("select ref from credits.stripe_requests where stripe_account = 'acct_1' order by 1")
        refs = [row[0] for row in moved]
    homes = ("cs_1", "cus_1", "cus_3", "in_1", "pi_1", "price_1", "prod_1", "sub_1")
    assert known == [(about, "acct_1") for about in homes]
    assert refs == ["line_items:cs_1", "p_1", "price:price_1", "price:price_3", "r_1", "sub_1"]


Break = Callable[[Path], None]


def broken_migration(home: Path) -> None:
    (home / "migrations" / "9999.broken.sql").write_text("create table credits.t ();\n\nselect no_such_column;\n")
    (home / "migrations" / "9999.broken.rollback.sql").write_text("drop table credits.t;")


def broken_code(home: Path) -> None:
    (home / "sql" / "98_broken.sql").write_text("create table credits.t ();\nselec 1;\n")


def broken_body(home: Path) -> None:
    (home / "sql" / "98_broken.sql").write_text(
        "create function credits._broken() returns int language sql as 'select no_such_function()';"
    )


def refused_by_a_check(home: Path) -> None:
    (home / "sql" / "98_broken.sql").write_text("do $$ begin raise 'not today' using hint = 'try tomorrow'; end $$;")


def against_the_house_rules(home: Path) -> None:
    (home / "sql" / "98_broken.sql").write_text("create table credits.without_row_level_security ();")


def without_a_way_back(home: Path) -> None:
    (home / "migrations" / "9999.broken.sql").write_text("create table credits.t ();")


def breaking_out(home: Path) -> None:
    (home / "sql" / "98_broken.sql").write_text("create table credits.t ();\nCOMMIT ;\n")


def outside_a_transaction(home: Path) -> None:
    broken_migration(home)
    (home / "migrations" / "9999.broken.sql").write_text("-- transactional: false\nvacuum;")


def in_another_order(home: Path) -> None:
    broken_migration(home)
    (home / "migrations" / "9999.broken.sql").write_text("-- depends: 0001.house\ncreate table credits.t ();")


@pytest.mark.parametrize("server", ["pg15"], indirect=True)
@pytest.mark.parametrize(
    ("do_break", "says"),
    [
        (broken_migration, ["9999.broken.sql, line 3", "no_such_column", "statement: select no_such_column;"]),
        (broken_code, ["98_broken.sql, line 2", "syntax error", "selec 1"]),
        (broken_body, ["credits._broken() does not compile", "no_such_function()"]),
        (refused_by_a_check, ["98_broken.sql: not today", "hint: try tomorrow"]),
        (against_the_house_rules, ["house rules are violated", "without_row_level_security"]),
        (without_a_way_back, ["9999.broken.rollback.sql is missing"]),
        (breaking_out, ["98_broken.sql, line 2", "'COMMIT'"]),
        (outside_a_transaction, ["9999.broken.sql", "transactional: false"]),
        (in_another_order, ["9999.broken.sql: 'depends'", "in the order of their names"]),
    ],
)
def test_a_broken_file_changes_nothing(empty_database: Database, home: Path, do_break: Break, says: list[str]) -> None:
    do_break(home)
    for before in ("an empty database", "a database that works"):
        dump = empty_database.dump()
        with pytest.raises(DeployError) as failed:
            migrate.migrate(empty_database.dsn, home)
        for words in says:
            assert words in str(failed.value), before
        assert empty_database.dump() == dump, before
        migrate.migrate(empty_database.dsn)


def test_the_command_says_what_is_wrong(empty_database: Database) -> None:
    with psycopg.connect(empty_database.dsn, autocommit=True) as conn:
        conn.execute("create schema credits")
    answer = pgcredits("migrate", "--dsn", empty_database.dsn)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("pgcredits: the beginning of the deploy: there is a schema credits, but no schema")
    assert "A schema credits of your own needs another name." in answer.stderr
    assert "Traceback" not in answer.stderr
    nobody = pgcredits("migrate", "--dsn", make_conninfo(empty_database.dsn, port=1))
    assert nobody.returncode == 1
    assert nobody.stderr.startswith("pgcredits: cannot reach the database: ")
    assert "Traceback" not in nobody.stderr


def test_a_database_from_the_future_is_left_alone(database: Database) -> None:
    with psycopg.connect(database.dsn) as conn:
        conn.execute("insert into credits_migrations._yoyo_migration values ('hash', '9999.of-tomorrow', now())")
    newer = r"9999\.of-tomorrow\. A newer version"
    with pytest.raises(DeployError, match=newer):
        migrate.migrate(database.dsn)
    with pytest.raises(DeployError, match=newer):
        migrate.rollback(database.dsn)


def test_a_connection_that_ends_between_two_files_is_told_so(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "_AS_OWNER", "select pg_terminate_backend(pg_backend_pid())")
    with pytest.raises(DeployError, match=r"^the deploy ended early: .*terminating connection"):
        migrate.migrate(database.dsn)


@EVERY_VERSION
def test_back_step_by_step_and_forth_again(database: Database) -> None:
    with database.connect(autocommit=True) as conn:
        client = Client(conn)
        client.open_account("a")
        client.grant_credits("a", 10, key="g")
        client.spend("a", 3, key="s")
        client.reserve("a", 2, "r")
    before = database.dump()
    assert migrate.rollback(database.dsn) == ALL[-1:]
    assert migrate.migrate(database.dsn) == ALL[-1:]
    assert database.dump() == before
    without = {}
    for name in reversed(ALL):
        assert migrate.rollback(database.dsn) == [name]
        without[name] = database.dump()
        with database.admin() as admin:
            routines = (
                "select count(*) from pg_proc where pronamespace = any (array[to_regnamespace('credits')]::oid[])"
            )
            assert admin.execute(routines).fetchone() == (0,)
    with database.admin() as admin:
        assert (
            admin.execute("select to_regnamespace('credits'), to_regnamespace('credits_api')").fetchone() == (None,) * 2
        )
    assert migrate.rollback(database.dsn, None) == []
    for migration in migrate.migrations():
        assert database.dump() == without[migration.name]
        with psycopg.connect(database.dsn) as conn:
            conn.execute(migration.path.read_bytes())
            conn.execute("reset role")
            conn.execute(migration.book("apply").encode())
    assert migrate.migrate(database.dsn) == []
    assert database.dump() == before


def test_a_rollback_that_fails_changes_nothing(database: Database, home: Path) -> None:
    (home / "migrations" / f"{ALL[0]}.rollback.sql").write_text("drop table credits.no_such_table;")
    before = database.dump()
    with pytest.raises(DeployError, match=r"0001\.house\.rollback\.sql, line|0001\.house\.rollback\.sql: "):
        migrate.rollback(database.dsn, None, home)
    assert database.dump() == before


def test_the_rollback_command_asks(database: Database) -> None:
    before = database.dump()
    assert pgcredits("rollback", "--dsn", database.dsn).returncode == 1  # no answer is no consent
    assert database.dump() == before
    answer = pgcredits("rollback", "--all", "--yes", "--dsn", database.dsn)
    assert answer.returncode == 0, answer.stderr
    assert f"Taken back: {', '.join(reversed(ALL))}." in answer.stdout
    assert "pgcredits migrate" in answer.stdout


def test_one_file_installs_with_psql_alone(empty_database: Database, database: Database, tmp_path: Path) -> None:
    file = tmp_path / "pgcredits.sql"
    printed = pgcredits("sql")
    assert printed.returncode == 0, printed.stderr
    file.write_text(printed.stdout)
    psql = ("psql", "--no-psqlrc", "--quiet", "-f", str(file), "--dbname", empty_database.dsn)
    said = empty_database.program(*psql)
    assert (said.stdout, said.stderr) == ("", "")
    assert empty_database.dump() == database.dump()
    again = empty_database.program(*psql, check=False)
    assert again.returncode != 0
    assert "pgcredits is installed here already" in again.stderr
    assert migrate.migrate(empty_database.dsn) == []
    assert empty_database.dump() == database.dump()


@ONE_ENGINE
def test_two_databases_use_different_idempotency_keys(empty_database: Database, database: Database) -> None:
    migrate.migrate(empty_database.dsn)
    first = []
    for made in (empty_database, database):
        with made.connect() as conn:
            client = Client(conn)
            client.open_account("a", email="a@example.com")
            client.get_or_create_stripe_customer("a", email="a@example.com")
            first += [row.idempotency_key for row in client.claim_stripe_requests()]
    assert len(set(first)) == 2, first


def test_yoyo_itself_reads_the_books(database: Database) -> None:
    parts = conninfo_to_dict(database.dsn)
    url = f"postgresql+psycopg://{parts['user']}:{parts['password']}@{parts['host']}:{parts['port']}/{parts['dbname']}"
    with get_backend(f"{url}?{urlencode({'schema': 'credits_migrations'})}") as backend:
        files = read_migrations(str(HOME / "migrations"))
        assert [migration.id for migration in files] == ALL
        assert list(backend.to_apply(files)) == []
        assert len(backend.to_rollback(files)) == len(ALL)


@pytest.fixture
def stranger(empty_database: Database) -> Iterator[str]:
    """A login without any right, which is gone with all it made after the test."""
    name = f"stranger_{empty_database.name}"
    with empty_database.admin() as admin:
        admin.execute(f"create role {name} login password 'x'".encode())
        yield name
        admin.execute(f"reassign owned by {name} to postgres; drop owned by {name}; drop role {name}".encode())


def test_a_dump_that_was_restored_in_part_is_told_so(database: Database, tmp_path: Path) -> None:
    dump = tmp_path / "dump"

    def said(taken: list[str], *left_out: str) -> str:
        database.program("pg_dump", "--format=custom", f"--file={dump}", *taken, database.dsn)
        with database.engine.database("template0") as restored:
            database.program("pg_restore", "--exit-on-error", *left_out, f"--dbname={restored.dsn}", str(dump))
            return pgcredits("migrate", "--dsn", restored.dsn).stderr

    owner = conninfo_to_dict(database.dsn)["user"]
    without_roles = f"the schema credits belongs to {owner}, not to credits_owner: it was restored without the roles"
    assert without_roles in said([], "--no-owner", "--no-privileges")
    assert "there is a schema credits, but no schema credits_migrations" in said(["--schema=credits"])
    assert said(["--schema=credits*"]) == ""


def test_missing_rights_come_with_advice(database: Database, empty_database: Database, stranger: str) -> None:
    # database is there so that the roles of pgcredits are, too
    dsn = make_conninfo(empty_database.dsn, user=stranger, password="x")

    def refused() -> str:
        with pytest.raises(DeployError) as failed:
            migrate.migrate(dsn)
        return str(failed.value).partition("advice: ")[2]

    with empty_database.admin() as admin:
        assert f'alter database "{empty_database.name}" owner to "{stranger}"' in refused()
        admin.execute(f"alter database {empty_database.name} owner to {stranger}".encode())
        assert f'alter role "{stranger}" createrole' in refused()
        admin.execute(f"alter role {stranger} createrole".encode())
        if admin.info.server_version >= 160000:  # before, CREATEROLE could have any role
            ours = "credits_owner, credits_service, credits_user, credits_forwarder"
            grant = f'grant {ours} to "{stranger}" with admin option'
            assert grant in refused()
            admin.execute(grant.encode())
        assert migrate.migrate(dsn) == ALL
