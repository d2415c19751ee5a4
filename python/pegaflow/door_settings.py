"""The check of the settings that all doors have whose objects lie in a store of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegaflow.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def check(door: str, where: str, given: Mapping[str, Any], known: Iterable[str], numbers: Mapping[str, int]) -> None:
    """Checks names, `path`, `namespace` and whole numbers from 1 to what `numbers` says; what is not given is right,
    except for `path`.

    Raises:
        InvalidInputError: it names everything that is wrong with what stands in `where`.
    """
    known = list(known)
    problems = [
        f"'{name}' is not a setting of {door}; remove it, or use one of {', '.join(known)}"
        for name in given
        if name not in known
    ]
    for name, high in numbers.items():
        value = given.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            problems.append(f"{name} is {value!r}; give a whole number from 1 to {high}")
    if not isinstance(given.get("path"), str) or not given["path"]:
        problems.append('path is missing; give the directory of the store as "path"')
    namespace = given.get("namespace", "")
    if not isinstance(namespace, str) or "\0" in namespace:
        problems.append(f"namespace is {namespace!r}; give a text without zero bytes")
    if problems:
        raise InvalidInputError(f"{where}: {'; '.join(problems)}")
