"""Reads the quantisation settings from the configs of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wellcond.recipes.base import Content, RecipeError, show

_MOST = 64  # different values that a setting can have in all layers
_LETTERS = 80  # length to which a word is cut


@dataclass(frozen=True)
class Settings:
    """The settings in several files, which must not contradict each other.

    Attributes:
        sources: the contents of the files by their names.
    """

    sources: Mapping[str, Mapping[str, Any]]
    # Caches of values and errors: values can be long, and every weight reads them.
    _known: dict[tuple[str, ...], tuple[Any, str]] = field(default_factory=dict)
    _of_layers: dict[tuple[str, str], set[int]] = field(default_factory=dict)

    def get(self, *keys: str) -> Any:
        """The value of a setting that can have these names; None if no file contains it.

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
        """The integer values of the setting `own` of single layers in the mapping `key`.

        Raises:
            RecipeError: there are too many values, or two files have different mappings `key`.
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
        """The value of a setting that must be an integer; None if no file contains it.

        Raises:
            RecipeError: the value is not an integer, or two values differ.
        """
        value = self.get(*keys)
        if value is not None and type(value) is not int:
            raise RecipeError(f"{keys[0]} is {show(value)} in {' and '.join(self.sources)}")
        return value

    def word(self, *keys: str) -> str:
        """The value of a setting that must be a string, in lower case; "" if no file contains it.

        Raises:
            RecipeError: the value is not a string, or two values differ.
        """
        value = self.get(*keys)
        if value is not None and not isinstance(value, str):
            raise RecipeError(f"{keys[0]} is {show(value)} in {' and '.join(self.sources)}")
        return (value or "")[:_LETTERS].lower()


def read_settings(content: Content, beside: str) -> Settings:
    """Reads the settings in config.json and in another file of the same folder."""
    sources = {"config.json": content.quantization(), beside: content.beside(beside)}
    known = {file: one for file, one in sources.items() if one and isinstance(one, Mapping)}
    return Settings(known)
