"""What the configs beside a checkpoint say of its quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wellcond.recipes.base import Content, RecipeError


@dataclass(frozen=True)
class Settings:
    """The settings in several files, which must not contradict each other.

    Attributes:
        sources: their contents, by the names of the files.
    """

    sources: Mapping[str, Mapping[str, Any]]

    def get(self, *keys: str) -> Any:
        """The value of a setting that has these names; None if no file has it.

        Raises:
            RecipeError: two values differ.
        """
        found = [
            (file, key, source[key])
            for file, source in self.sources.items()
            for key in keys
            if source.get(key) is not None
        ]
        for file, key, value in found[1:]:
            if value != found[0][2]:
                of, first, other = found[0]
                raise RecipeError(f"{first} is {other} in {of}, and {key} is {value} in {file}")
        return found[0][2] if found else None

    def integer(self, *keys: str) -> int | None:
        """A setting that must be an integer.

        Raises:
            RecipeError: it is something else, or two values differ.
        """
        value = self.get(*keys)
        if value is not None and type(value) is not int:
            raise RecipeError(f"{keys[0]} is {value!r} in {' and '.join(self.sources)}")
        return value

    def word(self, *keys: str) -> str:
        """A setting that must be a word, in small letters; "" if no file has it.

        Raises:
            RecipeError: it is something else, or two values differ.
        """
        value = self.get(*keys)
        if value is not None and not isinstance(value, str):
            raise RecipeError(f"{keys[0]} is {value!r} in {' and '.join(self.sources)}")
        return (value or "").lower()


def read_settings(content: Content, beside: str) -> Settings:
    """The settings in config.json and in a file beside it."""
    sources = {"config.json": content.quantization(), beside: content.beside(beside)}
    known = {file: one for file, one in sources.items() if one and isinstance(one, Mapping)}
    return Settings(known)
