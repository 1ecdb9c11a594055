"""A user's workspace with a table of its own, and trainings without a tracker."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mlops_workbench.experiment.recorder import Recorder
from mlops_workbench.experiment.training import TrainingResult, fit
from mlops_workbench.recipes.protocol import Recipe, Scalar, encode

CUSTOMERS_RECIPE = """
from mlops_workbench.recipes.tabular import TabularRecipe

recipe = TabularRecipe(
    name="churn",
    source="data/customers.csv",
    key="customer",
    label="outcome",
    classes=("stays", "leaves", "moves"),
    numbers={"age": (0, 120), "fee": (None, None)},
    categories={"plan": ["basic", "plus", "pro"], "stars": ["1", "2", "3", "4", "5"]},
    slices=("plan",),
)
"""


def write_customers(root: Path, rows: int = 900) -> Path:
    """A CSV as people have them: gaps, whole numbers beside gaps, answers in words, columns too many."""
    generator = np.random.default_rng(7)
    age = generator.integers(18, 90, rows).astype(float)
    plan = generator.choice(["basic", "plus", "pro"], rows)
    pull = (age - 50) / 15 + (plan == "pro") + generator.normal(0, 0.7, rows)
    outcome = np.select([pull < -0.3, pull < 0.8], ["stays", "leaves"], "moves")
    age[generator.random(rows) < 0.1] = np.nan
    stars = generator.integers(1, 6, rows).astype(float)
    stars[generator.random(rows) < 0.2] = np.nan
    table = pd.DataFrame(
        {
            "customer": [f"c{number:05d}" for number in range(rows)],
            "note": "called twice",
            "age": age,
            "fee": np.round(generator.lognormal(3, 1, rows), 2),
            "plan": plan,
            "stars": stars,
            "outcome": outcome,
        }
    )
    path = root / "data" / "customers.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path


def train(
    recipe: Recipe,
    frame: pd.DataFrame,
    folder: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    **parameters: Scalar,
) -> TrainingResult:
    """A training on the recipe's own split."""
    place = folder or Path(tempfile.mkdtemp())
    part = recipe.split(frame)
    with Recorder(place) as recorder:
        return fit(
            recipe,
            frame[part == "train"],
            frame[part == "validation"],
            parameters=parameters,
            seed=seed,
            folder=place,
            recorder=recorder,
            device=device,
        )


def answer(model: torch.nn.Module, recipe: Recipe, frame: pd.DataFrame) -> np.ndarray:
    """The model's probabilities for these rows."""
    arrays, _ = encode(recipe, frame)
    with torch.no_grad():
        return model(**{name: torch.from_numpy(values) for name, values in arrays.items()}).numpy()


def judge(model: torch.nn.Module, recipe: Recipe, frame: pd.DataFrame) -> dict[str, float]:
    """The recipe's figures for these rows."""
    _, labels = encode(recipe, frame)
    return recipe.metrics(labels, answer(model, recipe, frame))
