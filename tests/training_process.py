"""A training in a process of its own, to be killed: RECIPE SELECTION SEED FOLDER [device=JSON] [name=JSON ...]."""

import json
import sys
from pathlib import Path

from recipes_support import train

from mlops_workbench.recipes.protocol import load_recipe


def main() -> None:
    """Train, export, and write what is to be compared."""
    reference, selection, seed, place, *options = sys.argv[1:]
    folder = Path(place)
    recipe = load_recipe(reference, folder)
    parameters = {name: json.loads(value) for name, value in (o.split("=") for o in options)}
    result = train(recipe, recipe.source(selection), folder, int(seed), **parameters)
    from mlops_workbench.experiment.export import export_model  # loads for seconds: only when done

    export_model(recipe, result, folder / "out")
    history = [{k: v for k, v in e.items() if k != "epoch_seconds"} for e in result.history]
    (folder / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main()
