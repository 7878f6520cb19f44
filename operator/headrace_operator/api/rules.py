"""Building blocks of the schema: CEL rules and the field types that carry them."""

from typing import Annotated, Any

from pydantic import Field

VALIDATIONS = "x-kubernetes-validations"
PRESERVE_UNKNOWN = "x-kubernetes-preserve-unknown-fields"
INT_OR_STRING = "x-kubernetes-int-or-string"

QUANTITY_PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)

Passthrough = Annotated[dict[str, Any], Field(json_schema_extra={PRESERVE_UNKNOWN: True})]
"""An object of the core API handed on as it is; the API server checks it on the child."""

Quantity = Annotated[
    int | str,
    Field(json_schema_extra={INT_OR_STRING: True, "pattern": QUANTITY_PATTERN, "maxLength": 32}),
]


def rule(
    expression: str, field: str, text: str, *, value: str = "self", at: str | None = None
) -> dict[str, str]:
    """Return one CEL validation with the message '<field>: "<value>": <text>'.

    Args:
        expression: CEL, true for a valid value; `self` is what the rule is attached to.
        field: path of the field from the root of the object.
        text: the rule and the fix, in the form "must ...; do ...".
        value: CEL expression of the refused value, of type string. Not string(number): its
            estimated length, and so the rule's cost, is unbounded.
        at: path of the field to blame below `self`, such as ".args".
    """
    text = text.replace("'", "\\'")
    validation = {
        "rule": expression,
        "messageExpression": f"'{field}: \"' + {value} + '\": {text}'",
    }
    return validation if at is None else {**validation, "fieldPath": at}


def rules(*validations: dict[str, str]) -> dict[str, Any]:
    """Return the `json_schema_extra` that attaches CEL validations to a model or field."""
    return {VALIDATIONS: list(validations)}


def matches(field: str, pattern: str, text: str) -> dict[str, Any]:
    """Attach the rule that a string matches a pattern (RE2, without quotes)."""
    return rules(rule(f"self.matches('{pattern}')", field, text))


def object_name(field: str) -> dict[str, Any]:
    """Attach the rule that a string can be the name of an object (DNS subdomain)."""
    return rules(
        rule(
            "!format.dns1123Subdomain().validate(self).hasValue()",
            field,
            'must be the name of an object; use lower case letters, digits, "-" and "."',
        )
    )


def every(condition: str, field: str, text: str) -> dict[str, str]:
    """Return the rule that `condition` holds for every item or key `e`; the first one is quoted."""
    return rule(
        f"self.all(e, {condition})", field, text, value=f"self.filter(e, !({condition}))[0]"
    )


def owned_keys(field: str, pattern: str) -> dict[str, str]:
    """Return the rule that no key of a map matches `pattern` (RE2)."""
    return every(
        f"!e.matches('{pattern}')", field, "the operator owns this key; choose another one"
    )


def label_syntax(field: str) -> list[dict[str, str]]:
    """Return the rules that a map can be the labels of an object."""
    return [
        every(
            "!format.qualifiedName().validate(e).hasValue()",
            field,
            'must be a label key; use [prefix/]name of letters, digits, "-", "_", "."',
        ),
        every(
            "!format.labelValue().validate(self[e]).hasValue()",
            field,
            'must have a label value; use at most 63 letters, digits, "-", "_", "."',
        ),
    ]
