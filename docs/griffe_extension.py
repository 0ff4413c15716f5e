"""What mkdocstrings must know of our docstrings; griffe is the part of it that reads them."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Read `Example:` as examples, and the help of a dataclass's field as the field's docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section: griffe knows doctests under `Examples:` only."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Describe a field by the help that its command line shows, and show its default alone."""
        if not isinstance(attr.value, griffe.ExprCall) or str(attr.value.function) != "field":
            return
        words = {word.name: word.value for word in attr.value.arguments if isinstance(word, griffe.ExprKeyword)}
        if isinstance(words.get("metadata"), griffe.ExprDict) and "'help'" in map(str, words["metadata"].keys):
            attr.docstring = griffe.Docstring(ast.literal_eval(str(words["metadata"].values[0])), parent=attr)
            attr.value = words.get("default", attr.value)
