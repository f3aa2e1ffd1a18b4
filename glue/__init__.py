"""pgcredits: prepaid credits inside your own Postgres. This package is the door; what decides is in sql/."""

from importlib.metadata import version

__version__ = version("pgcredits")
