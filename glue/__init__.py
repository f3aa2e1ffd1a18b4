"""pgcredits: prepaid credits inside your own Postgres. This package is the door; what decides is in sql/."""

from importlib.metadata import version

from pgcredits.client import AsyncUsage, CreditsError, Usage, usage, usage_async

__all__ = ["AsyncUsage", "CreditsError", "Usage", "usage", "usage_async"]
__version__ = version("pgcredits")
