"""docker-compose.yml for real: images are built, a purchase, pg_cron, a crash, a restart. And what the file says."""

import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pytest
import yaml
from door import SECRET, paid, signature
from five_ways import free_port
from psycopg.conninfo import make_conninfo
from servers import missing

from pgcredits import migrate

ROOT = Path(__file__).resolve().parents[1]
FILE = (ROOT / "docker-compose.yml").read_text()
PATIENCE = 120
NAMES = ("POSTGRES_PORT", "PGCREDITS_PORT", "POSTGREST_PORT")


def ran(
    *command: str, check: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def eventually(found: Callable[[], Any]) -> Any:
    """What is found, once it is something and raises nothing."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if answer := found():
                return answer
        except (httpx.TransportError, psycopg.OperationalError):
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.25)


@dataclass
class Project:
    """The services of one docker-compose.yml, under a name and on ports of their own."""

    command: list[str]
    environment: dict[str, str]

    def __call__(self, *arguments: str, check: bool = True) -> str:
        return ran(*self.command, *arguments, check=check, environment=self.environment).stdout.strip()

    def dsn(self, user: str, password: str, **more: Any) -> str:
        port, password = self.environment["POSTGRES_PORT"], self.environment[password]
        return make_conninfo(host="127.0.0.1", port=port, user=user, password=password, dbname="product", **more)

    def row(self, query: str) -> Any:
        """What credits_service is answered, by the door's login."""
        dsn = self.dsn("credits_forwarder", "PGCREDITS_FORWARDER_PASSWORD", options="-c role=credits_service")
        with psycopg.connect(dsn, autocommit=True) as conn:
            return conn.execute(query.encode()).fetchone()

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.environment[service]}"


@pytest.fixture(scope="module")
def images() -> None:
    """The images of docker-compose.yml, built by the engine of this machine."""
    if not shutil.which("docker") or ran("docker", "version", check=False).returncode:
        missing("docker", "no Docker engine answers")
    with (Path(os.environ["PGCREDITS_TEST_RUN"]) / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what one worker has built another finds
        ran(*compose(), "build", environment=secrets())


def compose() -> list[str]:
    """Compose v2 where it is, else v1."""
    v2 = ran("docker", "compose", "version", check=False).returncode == 0
    return ["docker", "compose"] if v2 else ["docker-compose"]


def secrets() -> dict[str, str]:
    """What new-env.sh prints, with the signing secret of the tests."""
    lines = ran("sh", "deploy/new-env.sh").stdout.splitlines()
    return {**dict(line.split("=", 1) for line in lines if "=" in line), "STRIPE_WEBHOOK_SECRET": SECRET}


@pytest.fixture
def project(images: None) -> Iterator[Project]:
    ports = {name: str(free_port()) for name in NAMES}
    project = Project([*compose(), "-p", f"pgcredits-test-{os.getpid()}"], {**secrets(), **ports})
    try:
        yield project
    finally:
        project("down", "-v", "--timeout", "5", check=False)


def ready(project: Project) -> bool:
    return httpx.get(project.url("PGCREDITS_PORT") + "/readyz").status_code == 200


def test_the_services_work_together_and_keep_what_they_have(project: Project) -> None:
    project("up", "-d", "door")
    eventually(lambda: ready(project))
    assert httpx.get(project.url("PGCREDITS_PORT") + "/healthz").json() == {"status": "alive"}
    for service in ("db", "door"):
        assert project("exec", "-T", service, "id", "-u") == "999"
    assert project("port", "door", "8080").startswith("127.0.0.1:")

    project.row("select credits.load_demo_catalog()")
    project.row("select credits.open_account('alpha')")
    price, currency = project.row("select price, currency from credits.list_packages() where code = 'starter'")
    body = paid("alpha", amount_subtotal=price, amount_total=price, currency=currency)
    for outcome in ("applied", "duplicate"):
        answer = httpx.post(
            project.url("PGCREDITS_PORT") + "/webhooks/stripe/default",
            content=body, headers={"Stripe-Signature": signature(body)},
        )  # fmt: skip
        assert (answer.status_code, answer.json()["outcome"]) == (200, outcome)
    bought = project.row("select available from credits.get_balance('alpha')")
    assert bought[0] > 0

    owner = project.dsn("credits_admin", "POSTGRES_PASSWORD")
    with psycopg.connect(owner) as conn:
        assert conn.execute("select rolsuper from pg_roles where rolname = current_user").fetchone() == (False,)
    jobs = "select count(*) from credits.list_job_runs() where runner ~ 'cron' and outcome = 'done'"
    eventually(lambda: project.row(jobs)[0])

    if ran("docker", "image", "inspect", "postgrest/postgrest:v12.0.2", check=False).returncode == 0:
        asked_of_postgrest(project)
    project("kill", "-s", "SIGKILL", "db")
    project("up", "-d", "door")
    eventually(lambda: ready(project))
    assert project.row("select available from credits.get_balance('alpha')") == bought
    project("down", "--timeout", "5")
    project("up", "-d", "door")
    eventually(lambda: ready(project))
    assert project.row("select available from credits.get_balance('alpha')") == bought
    assert project.row("select count(*) from credits.audit()") == (0,)


def asked_of_postgrest(project: Project) -> None:
    project.row("select credits.set_issuer('https://issuer.example', audiences => array['credits'])")
    project.row("select credits.link_identity('alpha', 'https://issuer.example', 'user-1')")
    claims = {"iss": "https://issuer.example", "sub": "user-1", "aud": "credits", "exp": time.time() + 600}
    token = jwt.encode(claims, project.environment["PGCREDITS_JWT_SECRET"], "HS256")
    project("up", "-d", "postgrest")
    for service in ("POSTGREST_PORT", "PGCREDITS_PORT"):
        url, headers = project.url(service) + "/rpc/get_balance", {"Authorization": f"Bearer {token}"}
        answer = eventually(lambda: (got := httpx.post(url, json={}, headers=headers)).status_code == 200 and got)  # noqa: B023
        assert answer.json()["account_id"] == "alpha"


def test_the_image_of_postgres_serves_tests_elsewhere(images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
    from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415 - reads the environment

    container = PostgresContainer(
        "pgcredits/postgres", driver=None, username="owner", password="of-the-tests", dbname="shop"
    )
    with container as postgres:
        dsn = make_conninfo(
            host=postgres.get_container_host_ip(), port=postgres.get_exposed_port(5432), user="owner",
            password="of-the-tests", dbname="shop",
        )  # fmt: skip
        migrate.migrate(dsn)
        with psycopg.connect(dsn) as conn:
            conn.execute("set role credits_owner")
            conn.execute("select credits.open_account('alpha')")
            assert conn.execute("select available from credits.get_balance('alpha')").fetchone() == (0,)


def test_every_port_is_of_this_machine_alone_and_every_password_is_asked_for() -> None:
    services = yaml.safe_load(FILE)["services"]
    assert set(services) == {"db", "migrate", "door", "postgrest", "hasura"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
    required = set(re.findall(r"\$\{(\w+):\?", FILE))
    assert required <= {name for name, value in secrets().items() if value}
    assert "HASURA_GRAPHQL_ADMIN_SECRET" in required
    assert len({value for name, value in secrets().items() if name in required}) == len(required)
    assert all(secrets()[name] != value for name, value in secrets().items() if name in required)
