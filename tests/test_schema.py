"""JSON schemas: every answer obeys, by ``jsonschema``; every keyword that is not enforced is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from test_pattern import compiled, drawn

from esjax.errors import InputError
from esjax.sample.schema import schema_pattern
from esjax.tokens.tokenizer import ChatTokenizer

TEXT = {"type": "string", "maxLength": 6}
# The quickest schema of a kind, each with an answer that fits another schema and not this one: the oracle's control.
FOLLOWED: list[tuple[Any, Any]] = [
    ({"type": "string"}, 1),
    ({"type": "string", "minLength": 3, "maxLength": 5}, "ab"),
    ({"type": "string", "minLength": 40, "maxLength": 400}, "ab"),
    ({"type": "string", "pattern": '^[a-c"\\\\\n]{2,4}$'}, "d"),
    ({"type": "string", "pattern": "[^a]{3}"}, "a"),
    ({"type": "integer"}, 1.5),
    ({"type": "integer", "minimum": 1, "maximum": 5}, 6),
    ({"type": "integer", "exclusiveMinimum": -20, "maximum": 90, "multipleOf": 7}, -20),
    ({"type": "integer", "minimum": 0}, -1),
    ({"type": "integer", "exclusiveMinimum": 0}, 0),
    ({"type": "number"}, "1"),
    ({"type": "number", "minimum": 0}, -0.5),
    ({"type": ["boolean", "null", "integer"]}, "x"),
    ({"enum": ["glad", 'so "so"', 1.5, None, [1, {"a": 2}], "né\n"]}, "sad"),
    ({"type": "string", "enum": ["a", 1, "b"]}, 1),
    ({"const": {"a": [True]}}, {"a": [False]}),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "x"),
    ({"type": "array", "items": TEXT}, [1]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}, [1]),
    ({"type": "array", "items": {"type": "integer"}, "maxItems": 1, "uniqueItems": True}, [1, 1]),
    ({"type": "array", "maxItems": 0}, [1]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, TEXT], "items": False}, ["x"]),
    ({"type": "array", "prefixItems": [TEXT], "items": {"type": "null"}, "minItems": 2, "maxItems": 3}, ["x"]),
    ({"type": "object", "properties": {"a": TEXT, "b": TEXT, "c": TEXT}, "required": ["b"]}, {"a": "x"}),
    ({"properties": {"a": {"type": "integer"}, 'b"': {"type": "null"}}, "additionalProperties": False}, {"c": 1}),
    ({"type": "object", "properties": {"a": {"const": 1}, "b": False}, "required": ["a"]}, {"a": 2}),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": "x"}),
    (
        {
            "$ref": "#/$defs/a~1b",
            "$defs": {"a/b": {"type": "array", "items": {"$ref": "#/$defs/n"}}, "n": {"const": 3}},
        },
        [4],
    ),
    ({"title": "t", "description": "d", "default": 1, "examples": [1], "$comment": "c", "type": "null"}, 1),
    *(({"type": "string", "format": f}, 1) for f in ("date", "date-time", "uuid")),
]


@pytest.mark.parametrize(("schema", "other"), FOLLOWED, ids=[json.dumps(s)[:60] for s, _ in FOLLOWED])
def test_every_answer_obeys(schema: Any, other: Any, tokenizer: ChatTokenizer) -> None:
    template = compiled(schema_pattern(json.dumps(schema), "mine"), tokenizer, 120)
    check = Draft202012Validator(schema, format_checker=FormatChecker())
    for seed in range(9):
        text = drawn(template, tokenizer, seed, ("", "stop", "go")[seed % 3])
        value = json.loads(text, parse_constant=pytest.fail)
        assert check.is_valid(value), text
        text.encode()  # no lone surrogate
    assert not check.is_valid(other)  # control


def test_lengths_are_met_exactly_at_both_ends(tokenizer: ChatTokenizer) -> None:
    template = compiled(schema_pattern('{"type": "string", "minLength": 40, "maxLength": 400}', "m"), tokenizer, 500)
    lengths = [len(json.loads(drawn(template, tokenizer, i, ("stop", "go")[i % 2]))) for i in range(8)]
    assert max(lengths) == 400
    assert min(lengths) >= 40


@pytest.mark.parametrize("day", ["2024-02-31", "2023-02-29", "2024-04-31", "2024-13-01", "0000-01-01", "２024-01-01"])
def test_no_date_that_the_calendar_lacks(day: str) -> None:
    pattern = schema_pattern('{"type": "string", "format": "date"}', "mine")
    assert not re.fullmatch(pattern, f'"{day}"')
    assert re.fullmatch(pattern, '"2024-02-28"')
    assert re.fullmatch(pattern, '"2020-12-31"')


REFUSED: list[tuple[Any, str]] = [
    ({"allOf": [TEXT]}, r"\$\.allOf"),
    ({"type": "integer", "allOf": [{"minimum": 1}]}, r"\$\.allOf.*merged"),
    ({"oneOf": [TEXT, {"type": "null"}]}, r"\$\.oneOf|\$: any value"),
    ({"type": "string", "oneOf": [TEXT]}, r"\$\.oneOf.*anyOf"),
    ({"type": "string", "not": {"const": "a"}}, r"\$\.not"),
    ({"type": "string", "if": TEXT, "then": TEXT}, r"\$\.if"),
    ({"type": "integer", "minimum": 5}, r"\$\.minimum.*both ends"),
    ({"type": "integer", "minimum": 5, "maximum": 10**9}, r"\$\.maximum.*both ends"),
    ({"type": "integer", "minimum": 5.5, "maximum": 5.6}, "no value fits"),
    ({"type": "integer", "multipleOf": 3}, r"\$\.multipleOf"),
    ({"type": "number", "minimum": 1, "maximum": 2}, r"\$\.maximum.*number"),
    ({"type": "number", "exclusiveMinimum": 0}, r"\$\.exclusiveMinimum"),
    ({"type": "string", "minimum": 1}, r"\$\.minimum.*string"),
    ({"type": "string", "format": "time"}, r"\$\.format: time"),
    ({"type": "string", "format": "email"}, r"\$\.format: email.*uuid"),
    ({"type": "string", "format": "date", "maxLength": 3}, r"\$\.format"),
    ({"type": "string", "pattern": "a", "minLength": 3}, r"\$\.pattern"),
    ({"type": "string", "pattern": "(?=a)"}, r"\$\.pattern.*look-around"),
    ({"type": "string", "pattern": "("}, r"\$\.pattern: '\('"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, r"\$\.minLength"),
    ({"type": "string", "maxLenght": 2}, r"\$\.maxLenght"),
    ({"type": "string", "contentEncoding": "base64"}, r"\$\.contentEncoding"),
    ({"type": "array"}, r"\$: items of any kind"),
    ({"type": "array", "items": True}, r"\$: items of any kind"),
    ({"type": "array", "items": TEXT, "uniqueItems": True}, r"\$\.uniqueItems"),
    ({"type": "array", "items": TEXT, "contains": TEXT}, r"\$\.contains"),
    ({"type": "array", "items": TEXT, "unevaluatedItems": False}, r"\$\.unevaluatedItems"),
    ({"type": "array", "items": TEXT, "minItems": 3, "maxItems": 2}, r"\$\.minItems"),
    ({"type": "array", "prefixItems": [TEXT], "minItems": 2}, r"\$\.minItems"),
    ({"type": "object"}, "without properties"),
    ({"type": "object", "properties": {"a": TEXT}, "required": ["b"]}, r"\$\.required.*'b'"),
    ({"type": "object", "properties": {"a": TEXT}, "minProperties": 1}, r"\$\.minProperties"),
    ({"type": "object", "properties": {"a": TEXT}, "maxProperties": 1}, r"\$\.maxProperties"),
    ({"type": "object", "properties": {"a": TEXT}, "propertyNames": TEXT}, r"\$\.propertyNames"),
    ({"type": "object", "properties": {"a": TEXT}, "patternProperties": {"b": TEXT}}, r"\$\.patternProperties"),
    ({"type": "object", "properties": {"a": TEXT}, "dependentRequired": {"a": ["b"]}}, r"\$\.dependentRequired"),
    ({"type": "object", "properties": {"a": TEXT}, "unevaluatedProperties": False}, r"\$\.unevaluatedProperties"),
    ({"type": "object", "properties": {"a": {"items": {"oneOf": []}}}}, r"oneOf"),
    (
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string", "x": 1}}}},
        r"\$\.properties\.a\.items\.x",
    ),
    ({"type": "object", "properties": {"a": {}}}, r'\$\.properties\.a: any value.*"type"'),
    ({"type": "object", "properties": {"a": True}}, r"\$\.properties\.a: true allows any"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "string", "not": {}}}}, r"\$\.\$defs\.x\.not"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}}}, "contains itself"),
    ({"$ref": "#/$defs/x", "maxLength": 3, "$defs": {"x": TEXT}}, r"\$\.maxLength.*beside \$ref"),
    ({"$ref": "https://example.org/x"}, "not in this file"),
    ({"$ref": "#/absent"}, "not there"),
    ({"$dynamicRef": "#x", "type": "string"}, r"\$\.\$dynamicRef"),
    ({"enum": []}, "no value fits"),
    ({"enum": ["a"], "maxLength": 1}, r"\$\.maxLength"),
    ({"type": "integer", "enum": ["a"]}, "no value fits"),
    ({"type": "nonsense"}, r"\$\.type"),
    ({"type": "string", "maxLength": -1}, r"\$\.maxLength"),
    ({}, r'\$: any value.*"type"'),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=[json.dumps(s)[:60] for s, _ in REFUSED])
def test_what_is_not_enforced_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        schema_pattern(json.dumps(schema), "mine.json")
    assert str(e.value).startswith("mine.json: not a JSON schema that can be followed")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "not json", "1", "[1]", "null", '{"type": "object"'),
        '{"type": "string", "type": "null"}',
        '{"const": NaN}',
        '{"enum": [1, Infinity]}',
        '{"const": 1e999}',
        '{"type": "string", "pattern": "a{99999999999999999}"}',
        '{"type": "integer", "minimum": 1e999, "maximum": 3}',
        '{"type": "integer", "minimum": -1' + "0" * 400 + ', "maximum": 0.5}',
        '{"$defs": {"a": {"$id": "http://e/", "type": "null"}}, "$ref": "#/$defs/a"}',
    ],
)
def test_what_json_does_not_know_extreme_numbers_and_nested_ids_are_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^mine: not a JSON schema that can be followed") as e:
        schema_pattern(text, "mine")
    assert "\n" not in str(e.value)


def test_a_reference_may_name_the_schema_s_own_id() -> None:
    schema = '{"$id": "http://x/y", "$defs": {"a": {"type": "null"}}, "$ref": "http://x/y#/$defs/a"}'
    assert schema_pattern(schema, "here") == schema_pattern('{"type": "null"}', "here")
