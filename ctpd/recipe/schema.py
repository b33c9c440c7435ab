"""The JSON Schema of a recipe, generated from its types. Editors use it to complete, describe and check a recipe."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import DEFAULT_REF_TEMPLATE, models_json_schema

from ctpd.recipe.load import LEARNING_RATE
from ctpd.recipe.model import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NUMBERS = {"integer", "number"}


def schema_file() -> Path:
    """The schema that comes with the package, beside the shipped recipes; `make schema` writes it."""
    return Path(str(resources.files("ctpd") / "recipes" / "recipe.schema.json"))


def recipe_schema(params: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The schema of a recipe.

    Args:
        params: the type of each method's parameters, by the method's name.
    """
    models: list[type[BaseModel]] = [Recipe, *dict.fromkeys(params.values())]
    names, whole = models_json_schema([(model, "validation") for model in models])
    defs: dict[str, Any] = whole["$defs"]
    recipe = defs.pop("Recipe")
    run = defs["RunSpec"]
    run["properties"]["method"]["enum"] = list(params)
    run["allOf"] = [_of_method(method, names[model, "validation"], defs) for method, model in params.items()]
    return {
        "$schema": DRAFT,
        "title": "A ctpd recipe",
        **_tidied(recipe),
        "$defs": {k: _tidied(d) for k, d in defs.items()},
    }


def model_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of another file, such as a suite."""
    schema: dict[str, Any] = _tidied(model.model_json_schema())
    return schema | {"$defs": {name: _tidied(one) for name, one in schema.get("$defs", {}).items()}}


def schema_text(schema: Mapping[str, Any]) -> str:
    """The text of the shipped file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _of_method(method: str, reference: Mapping[str, str], defs: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a run of this method: its parameters in `params`, numeric ones also in `tuned`."""
    fields = defs[reference["$ref"].removeprefix(DEFAULT_REF_TEMPLATE.format(model=""))]["properties"]
    tuned = {name: field for name, field in fields.items() if _types(field) & _NUMBERS}
    rate = {"type": "number", "exclusiveMinimum": 0, "description": "Peak learning rate."}
    return {
        "if": {"properties": {"method": {"const": method}}, "required": ["method"]},
        "then": {
            "properties": {
                "params": reference,
                "tuned": {"properties": {LEARNING_RATE: rate, **tuned}, "additionalProperties": False},
            }
        },
    }


def _types(field: Mapping[str, Any]) -> set[str]:
    return {option["type"] for option in field.get("anyOf", [field]) if "type" in option}


def _tidied(schema: Any, *, of_names: bool = False) -> Any:
    """Remove pydantic's titles, which repeat the names, and put descriptions on one line.

    ``of_names``: ``schema`` is a mapping from property names to schemas.
    """
    if isinstance(schema, list):
        return [_tidied(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if of_names or name != "title"}
    tidy = {name: _tidied(value, of_names=name == "properties" and not of_names) for name, value in kept.items()}
    if not of_names and isinstance(tidy.get("description"), str):
        tidy["description"] = " ".join(tidy["description"].split())
    return tidy
