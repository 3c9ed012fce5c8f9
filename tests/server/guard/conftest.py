"""The guard is tested with the controllers' costs."""

from __future__ import annotations

from tests.controllers.conftest import make_profile

__all__ = ["make_profile"]
