"""Optional dependencies: import them where they are used, and say what to install when they are missing."""

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package of an extra is needed and not installed."""


def require(module: str, purpose: str, extra: str = "train") -> Any:
    """Import ``module``; a :class:`MissingExtraError` names the package, what it is for, and how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise MissingExtraError(
            f"{purpose}: expected the package {package}, which is not installed; run pip install 'prefix-fast[{extra}]'"
        ) from error
