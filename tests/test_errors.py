"""Errors say where, what and why, and one class catches them all."""

import pytest

from critrm import errors
from critrm.errors import CritrmError, DataError


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"path": "a.jsonl", "line": 3, "field": "chosen"}, "a.jsonl:3: field 'chosen': empty"),
        ({"path": "a.jsonl"}, "a.jsonl: empty"),
        ({"field": "chosen"}, "field 'chosen': empty"),
        ({}, "empty"),
    ],
)
def test_a_data_error_names_file_line_and_field(where, message):
    error = DataError("empty", **where)
    assert str(error) == message
    assert error.reason == "empty"


def test_the_tree_in_the_docstring_is_the_tree():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(cls, CritrmError) for cls in classes)
    assert all(cls.__name__ in errors.__doc__ for cls in classes)
