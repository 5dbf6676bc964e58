"""JSON schemas as regular expressions: a keyword that the expression does not enforce is refused by name.

The texts are JSON as models write it (at most one blank between tokens), with an object's properties in the schema's order.
They are a part of what the schema allows, never more: no property beside those that are listed, strings that match a
``pattern`` as a whole, integers of at most fifteen digits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from esjax.errors import InputError
from esjax.run.jsonl import finite
from esjax.sample.pattern import Chars, Choice, Join, Node, parse, united, without

Schema = dict[str, Any]
IGNORED = {  # they say nothing about what is allowed
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id", "$defs", "definitions"),
}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
ENFORCED = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": BOUNDS,
    "number": BOUNDS,
    "boolean": set[str](),
    "null": set[str](),
}
REMEDIES = {
    "allOf": "write the merged schema in its place",
    "oneOf": "use anyOf",
    "if": "use anyOf, with one complete schema a case",
    "contains": "use prefixItems",
    "patternProperties": "list the names in properties",
    "propertyNames": "list the names in properties",
}
MOST_INTEGERS = 1000  # of a range that is written out
LONGEST = 300_000  # characters of an expression

BLANK = "[ ]?"
COMMA = f"{BLANK},{BLANK}"
CHARACTER = r'(?:[^"\\\x00-\x1f\x7f-\x9f]|\\["\\/bfnrt])'
NATURAL = "(?:0|[1-9][0-9]{0,14})"
REST = r"(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,2})?"
MONTH_DAY = r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
DATE = f"[1-9][0-9]{{3}}-{MONTH_DAY}"  # without leap days, so that every day exists
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {
    "date": DATE,
    "date-time": f"{DATE}T{TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}


def schema_pattern(text: str, where: str) -> str:
    """The regular expression of JSON texts that all obey a JSON schema (Draft 2020-12).

    Raises InputError, naming ``where``, the keyword and its place, for a schema that is broken or asks for more.
    """
    from jsonschema import Draft202012Validator, SchemaError

    try:
        schema = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=finite)
        if not isinstance(schema, dict):
            raise ValueError(f"expected a JSON object, found {json.dumps(schema)[:40]}")
        Draft202012Validator.check_schema(schema)
        return _Walker(schema).pattern(schema, "$", ())
    except SchemaError as e:
        reason = f"{e.json_path}: {e.message}"
    except (ValueError, InputError, OverflowError) as e:
        reason = str(e)
    except RecursionError:
        reason = "it is nested too deeply"
    raise InputError(f"{where}: not a JSON schema that can be followed ({' '.join(reason.split())[:400]})")


def _once(pairs: list[tuple[str, Any]]) -> Schema:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError(f"a key comes twice in the object with {', '.join(map(repr, out))}")
    return out


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refusal(at: str, keyword: str, why: str) -> ValueError:
    return ValueError(f"{at}.{keyword}: {why}")


class _Walker:
    """Goes through a schema, which ``root`` contains."""

    def __init__(self, root: Schema) -> None:
        self.root = root

    def pattern(self, schema: Any, at: str, within: tuple[str, ...]) -> str:
        """The expression of a schema that stands at a JSON path, inside of these references. Raises ValueError."""
        if not isinstance(schema, dict):
            what = "allows any value, which no expression can" if schema else "allows no value"
            raise ValueError(f"{at}: {json.dumps(schema)} {what}; give a schema with a type")
        keywords = [k for k in schema if k not in IGNORED]
        if "$id" in schema and schema is not self.root:
            raise _refusal(at, "$id", "references below it would mean something else; leave it out")
        if "$ref" in keywords:
            self._only(keywords, {"$ref"}, at, " beside $ref")
            return self._reference(schema["$ref"], at, within)
        if "anyOf" in keywords:
            self._only(keywords, {"anyOf"}, at, " beside anyOf")
            options = [self.pattern(s, f"{at}.anyOf[{i}]", within) for i, s in enumerate(schema["anyOf"])]
            return self._checked(_either(options), at)
        if "enum" in keywords or "const" in keywords:
            self._only(keywords, {"enum", "const", "type"}, at, " beside enum or const")
            return self._values(schema.get("enum", [schema.get("const")]), schema, at)
        self._only(keywords, {"type"}.union(*ENFORCED.values()), at, "")
        types = self._types(schema, keywords, at)
        self._only(keywords, {"type"}.union(*(ENFORCED[t] for t in types)), at, f" for the type {' or '.join(types)}")
        makers: dict[str, Callable[[Schema, str, tuple[str, ...]], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda *_: "(?:true|false)",
            "null": lambda *_: "null",
        }
        return self._checked(_either([makers[t](schema, at, within) for t in types]), at)

    def _only(self, keywords: list[str], allowed: set[str], at: str, place: str) -> None:
        for keyword in keywords:
            if keyword not in allowed:
                remedy = REMEDIES.get(keyword, "leave it out, and check the answers afterwards")
                raise _refusal(at, keyword, f"this keyword is not enforced{place}; {remedy}")

    def _checked(self, pattern: str, at: str) -> str:
        if len(pattern) > LONGEST:
            raise ValueError(f"{at}: too large; use fewer alternatives, items or references")
        return pattern

    def _types(self, schema: Schema, keywords: list[str], at: str) -> list[str]:
        if "type" in keywords:
            given = schema["type"]
            return [given] if isinstance(given, str) else list(given)
        for kind in ("object", "array"):
            if any(k in ENFORCED[kind] for k in keywords):
                return [kind]
        raise ValueError(f'{at}: any value is allowed, which no expression can; give a "type"')

    def _reference(self, target: str, at: str, within: tuple[str, ...]) -> str:
        if target in within:
            raise _refusal(at, "$ref", f"{target} contains itself, which no expression can; write out so many levels")
        if self.root.get("$id"):
            target = target.removeprefix(str(self.root["$id"]).rstrip("#"))
        if target != "#" and not target.startswith("#/"):
            raise _refusal(at, "$ref", f"{target} is not in this file; write it as #/$defs/NAME")
        found: Any = self.root
        for part in target.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _refusal(at, "$ref", f"{target} is not there") from None
        return self.pattern(found, target.replace("#", "$").replace("/", "."), (*within, target))

    def _values(self, values: list[Any], schema: Schema, at: str) -> str:
        from jsonschema import Draft202012Validator

        check = Draft202012Validator({k: v for k, v in schema.items() if k not in IGNORED})
        fitting = [_dump(v) for v in values if check.is_valid(v)]
        if not fitting:
            raise ValueError(f"{at}: no value fits its keywords")
        return _either([re.escape(v) for v in fitting])

    def _integer(self, schema: Schema, at: str, within: tuple[str, ...]) -> str:
        bounds = {k: v for k, v in schema.items() if k in BOUNDS}
        if not bounds:
            return f"-?{NATURAL}"
        if bounds in ({"minimum": 0}, {"minimum": 1}, {"exclusiveMinimum": 0}):
            return NATURAL if bounds == {"minimum": 0} else "[1-9][0-9]{0,14}"
        low = max((v for k, v in bounds.items() if k in ("minimum", "exclusiveMinimum")), default=None)
        high = min((v for k, v in bounds.items() if k in ("maximum", "exclusiveMaximum")), default=None)
        if low is None or high is None or high - low > MOST_INTEGERS:
            remedy = f"give bounds at both ends, at most {MOST_INTEGERS} apart, or leave it out"
            raise _refusal(at, min(bounds), f"this keyword is not enforced for so many integers; {remedy}")
        return self._values(list(range(math.ceil(low), math.floor(high) + 1)), bounds, at)

    def _number(self, schema: Schema, at: str, within: tuple[str, ...]) -> str:
        bounds = {k: v for k, v in schema.items() if k in BOUNDS}
        if bounds and bounds != {"minimum": 0}:
            remedy = 'use "integer", or leave it out and check the answers afterwards'
            raise _refusal(at, min(bounds), f"this keyword is not enforced for the type number; {remedy}")
        return ("" if bounds else "-?") + NATURAL + REST

    def _string(self, schema: Schema, at: str, within: tuple[str, ...]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        for keyword in ("pattern", "format"):
            if keyword in schema and ENFORCED["string"] & set(schema) != {keyword}:
                raise _refusal(at, keyword, "this keyword is not enforced together with others; say all in the pattern")
        if "format" in schema:
            if schema["format"] not in FORMATS:
                allowed = ", ".join(FORMATS)
                raise _refusal(
                    at, "format", f"{schema['format']} is not enforced; allowed: {allowed}; or give a pattern"
                )
            return f'"{FORMATS[schema["format"]]}"'
        if "pattern" in schema:
            try:
                return f'"{_quoted(parse(schema["pattern"]))}"'
            except InputError as e:
                raise _refusal(at, "pattern", str(e)) from e
        if most != "" and least > most:
            raise _refusal(at, "minLength", f"{least} is more than maxLength")
        return f'"{CHARACTER}{{{int(least)},{most if most == "" else int(most)}}}"'

    def _array(self, schema: Schema, at: str, within: tuple[str, ...]) -> str:
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        if schema.get("uniqueItems") and (most is None or most > 1):
            raise _refusal(
                at, "uniqueItems", "this keyword is not enforced; leave it out, and check the answers afterwards"
            )
        if most is not None and least > most:
            raise _refusal(at, "minItems", f"{least} is more than maxItems")
        first = schema.get("prefixItems", [])
        first = [self.pattern(s, f"{at}.prefixItems[{i}]", within) for i, s in enumerate(first)]
        first = first if most is None else first[: int(most)]
        rest = ""
        if schema.get("items", True) not in (True, False):
            rest = self.pattern(schema["items"], f"{at}.items", within)
        elif least > len(first):
            raise _refusal(at, "minItems", "give items a schema, so that more of them can be made")
        elif not first and most != 0 and schema.get("items") is not False:
            raise ValueError(f"{at}: items of any kind are allowed, which no expression can; give items a schema")
        low = max(0, least - len(first))
        high: Any = "" if most is None else int(most) - len(first)
        if first or not rest or high == 0:
            inner = COMMA.join(first) + (f"(?:{COMMA}{rest}){{{low},{high}}}" if rest and high != 0 else "")
        else:
            inner = f"{rest}(?:{COMMA}{rest}){{{max(0, low - 1)},{high if high == '' else high - 1}}}"
            inner = inner if low else f"(?:{inner})?"
        return rf"\[{BLANK}{inner}{BLANK}\]" if inner else rf"\[{BLANK}\]"

    def _object(self, schema: Schema, at: str, within: tuple[str, ...]) -> str:
        properties, required = schema.get("properties", {}), set(schema.get("required", []))
        more = schema.get("additionalProperties", True)
        for name in required - set(properties):
            raise _refusal(at, "required", f"{name!r} is not among properties; describe it there")
        if not properties:
            if not isinstance(more, dict):
                raise ValueError(
                    f"{at}: an object without properties; list them, or give additionalProperties a schema"
                )
            value = self.pattern(more, f"{at}.additionalProperties", within)
            pair = f'"{CHARACTER}*"{BLANK}:{BLANK}{value}'
            return rf"\{{{BLANK}(?:{pair}(?:{COMMA}{pair})*)?{BLANK}\}}"
        pairs = []
        for name, inner in properties.items():
            if inner is False and name not in required:
                continue  # never made
            value = self.pattern(inner, f"{at}.properties.{name}", within)
            pairs.append((f"{re.escape(_dump(name))}{BLANK}:{BLANK}{value}", name in required))
        return rf"\{{{BLANK}{_listed(pairs)}{BLANK}\}}"


def _listed(pairs: list[tuple[str, bool]]) -> str:
    """Members in order with commas between them; those that are not required may be missing."""
    must = next((i for i, (_, required) in enumerate(pairs) if required), None)
    if must is None:
        tails = ["".join(f"(?:{COMMA}{p})?" for p, _ in pairs[i + 1 :]) for i in range(len(pairs))]
        return f"{_either([p + tail for (p, _), tail in zip(pairs, tails, strict=True)])}?" if pairs else ""
    before = "".join(f"(?:{p}{COMMA})?" for p, _ in pairs[:must])
    after = "".join(f"{COMMA}{p}" if required else f"(?:{COMMA}{p})?" for p, required in pairs[must + 1 :])
    return before + pairs[must][0] + after


def _either(options: list[str]) -> str:
    return f"(?:{'|'.join(options)})"


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)  # lone surrogates


def _quoted(node: Node) -> str:
    """The expression of what a JSON string holds between its quotes where its value matches the tree."""
    if isinstance(node, Chars):
        bare = without(united([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]))
        low, high = ([r for r in node.ranges if (r[0] > 0x5C) is up] for up in (False, True))
        both = without(united([*without(united(low)), *without(bare)])) if low else ()
        inside = "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in (*both, *high))
        escaped = [c for a, b in low for c in range(a, min(b, 0x5C) + 1) if c < 0x20 or c in (0x22, 0x5C)]
        return _either(
            [f"[{inside}]"] * bool(inside) + [re.escape(_dump(chr(c))[1:-1]) for c in escaped] or [r"[^\s\S]"]
        )
    if isinstance(node, Join):
        return "".join(map(_quoted, node.parts))
    if isinstance(node, Choice):
        return _either(list(map(_quoted, node.options)))
    return f"(?:{_quoted(node.body)}){{{node.least},{'' if node.most is None else node.most}}}"
