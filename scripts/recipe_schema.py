"""Write the JSON Schema of a recipe from the types, into the package, and docs/reference.md from it: `make schema`."""

from pathlib import Path

from ctpd.inspection.reference import page, reference
from ctpd.pipeline.methods import METHODS, params_type
from ctpd.recipe.schema import recipe_schema, schema_file, schema_text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"

if __name__ == "__main__":
    schema = recipe_schema({name: params_type(name) for name in METHODS})
    for path, text in ((schema_file(), schema_text(schema)), (PAGE, page(reference(schema)))):
        path.write_text(text, encoding="utf-8")
        print(path)
