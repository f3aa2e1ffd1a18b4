"""The wheel: built, installed far from the checkout, and complete."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from servers import Database

from pgcredits import migrate


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("glue", "migrations", "sql"):  # a copy, so that no earlier build lends its files
        shutil.copytree(migrate.HOME / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (migrate.HOME / file).exists():
            shutil.copy(migrate.HOME / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it. The dependencies are lent by the one that runs the tests."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    (site,) = home.glob("lib/python*/site-packages")
    lent = [path for path in sys.path if path.endswith("site-packages")]
    # Paths alone: what .pth files there say, such as where the checkout is, does not count here.
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PGCREDITS_", "PYTHON"))}
    return subprocess.run(
        [program, *arguments], cwd="/", env=clean, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    home = migrate.HOME
    code = (path for path in (home / "glue").rglob("*.*") if path.suffix != ".pyc")
    files = [*(home / "migrations").glob("*.sql"), *(home / "sql").rglob("*.*"), *code]
    expected = {f"pgcredits/{path.relative_to(home)}".replace("pgcredits/glue/", "pgcredits/") for path in files}
    assert {name for name in held if name.startswith("pgcredits/")} == expected


def test_an_installed_wheel_deploys(installed: Path, empty_database: Database, database: Database) -> None:
    where = run(installed, "-c", "import pgcredits.migrate as m; print(m.HOME)")
    assert where.returncode == 0, where.stderr
    assert Path(where.stdout.strip()).is_relative_to(installed.parent.parent)
    first = run(installed, "-m", "pgcredits", "migrate", "--dsn", empty_database.dsn)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Applied: 0001")
    assert empty_database.dump() == database.dump()
    assert run(installed, "-m", "pgcredits", "rollback", "--all", "--yes", "--dsn", empty_database.dsn).returncode == 0
    assert run(installed.with_name("pgcredits"), "sql").stdout == "".join(migrate.script())
