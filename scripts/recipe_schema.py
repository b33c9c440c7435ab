"""Write the JSON Schema of a recipe from the types, into the package: `make schema`."""

from ctpd.pipeline.methods import METHODS, params_type
from ctpd.recipe.schema import recipe_schema, schema_file, schema_text

if __name__ == "__main__":
    schema_file().write_text(
        schema_text(recipe_schema({name: params_type(name) for name in METHODS})), encoding="utf-8"
    )
    print(schema_file())
