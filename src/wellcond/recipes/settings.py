"""What the configs beside a checkpoint say of its quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wellcond.recipes.base import Content, RecipeError, show

_MOST = 64  # values that a setting of layers has
_LETTERS = 80  # of a word that names something


@dataclass(frozen=True)
class Settings:
    """The settings in several files, which must not contradict each other.

    Attributes:
        sources: their contents, by the names of the files.
    """

    sources: Mapping[str, Mapping[str, Any]]
    # With what is wrong: the values may be long, and each weight asks for them.
    _known: dict[tuple[str, ...], tuple[Any, str]] = field(default_factory=dict)
    _of_layers: dict[tuple[str, str], set[int]] = field(default_factory=dict)

    def get(self, *keys: str) -> Any:
        """The value of a setting that has these names; None if no file has it.

        Raises:
            RecipeError: two values differ.
        """
        if keys not in self._known:
            self._known[keys] = self._find(keys)
        value, wrong = self._known[keys]
        if wrong:
            raise RecipeError(wrong)
        return value

    def _find(self, keys: tuple[str, ...]) -> tuple[Any, str]:
        found = [
            (file, key, source[key])
            for file, source in self.sources.items()
            for key in keys
            if source.get(key) is not None
        ]
        for file, key, value in found[1:]:
            of, first, other = found[0]
            if value != other:
                told = f"{first} is {show(other)} in {of}, and {key} is {show(value)} in {file}"
                return None, told
        return found[0][2] if found else None, ""

    def of_layers(self, key: str, own: str) -> set[int]:
        """The integers that a setting is for some layers; `key` has these by name or by pattern.

        Raises:
            RecipeError: there are too many, or two values of `key` differ.
        """
        if (key, own) not in self._of_layers:
            layers = self.get(key)
            each = layers.values() if isinstance(layers, dict) else ()
            values = (one.get(own) for one in each if isinstance(one, dict))
            self._of_layers[key, own] = {value for value in values if type(value) is int}
        if len(self._of_layers[key, own]) > _MOST:
            raise RecipeError(f"{key} has more than {_MOST} different values of {own}")
        return self._of_layers[key, own]

    def integer(self, *keys: str) -> int | None:
        """A setting that must be an integer.

        Raises:
            RecipeError: it is something else, or two values differ.
        """
        value = self.get(*keys)
        if value is not None and type(value) is not int:
            raise RecipeError(f"{keys[0]} is {show(value)} in {' and '.join(self.sources)}")
        return value

    def word(self, *keys: str) -> str:
        """A setting that must be a word, in small letters; "" if no file has it.

        Raises:
            RecipeError: it is something else, or two values differ.
        """
        value = self.get(*keys)
        if value is not None and not isinstance(value, str):
            raise RecipeError(f"{keys[0]} is {show(value)} in {' and '.join(self.sources)}")
        return (value or "")[:_LETTERS].lower()


def read_settings(content: Content, beside: str) -> Settings:
    """The settings in config.json and in a file beside it."""
    sources = {"config.json": content.quantization(), beside: content.beside(beside)}
    known = {file: one for file, one in sources.items() if one and isinstance(one, Mapping)}
    return Settings(known)
