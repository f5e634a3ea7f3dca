"""Functions that a recipe names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_sgopd.errors import ConfigError


def import_function(name: str, setting: str) -> Callable[..., Any]:
    """The function `import.path:function`, which `setting` names.

    Raises:
        ConfigError: no such module or function, or a module that fails when imported.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ConfigError(f"{setting} {name!r} is not of the form import.path:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"{setting} {name!r} cannot be imported ({type(error).__name__}: {error}): "
            "give import.path:function of a module that `python -c 'import import.path'` finds"
        ) from error
    if not callable(function):
        raise ConfigError(f"{setting} {name!r} is a {type(function).__name__}, not a function")
    return function
