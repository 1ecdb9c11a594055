"""Workspaces with a planted fault for the tests of the diagnosis."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlops_workbench.core.workspace import create_workspace
from mlops_workbench.data.versions import DataStore
from mlops_workbench.experiment.retrains import Budget
from mlops_workbench.pipeline.culprit import Culprit, find_culprit
from mlops_workbench.recipes.pictures import PictureRecipe, digits
from mlops_workbench.recipes.protocol import Recipe

NAMES = {"key": "picture_id", "label": "label"}


@dataclass(frozen=True)
class Planted:
    """A line of versions, and what is wrong with it."""

    store: DataStore
    refs: list[str]
    guilty_version: str  # "" when nothing was planted
    guilty_change: str
    wrong: set[str]  # keys of rows with a wrong label


def off_by_one(rows: pd.DataFrame, classes: int = 10) -> pd.DataFrame:
    """The rows with every label one too high."""
    return rows.assign(label=(rows["label"] + 1) % classes)


def noisy(
    rows: pd.DataFrame, count: int, seed: int, classes: int = 10
) -> tuple[pd.DataFrame, set[str]]:
    """The rows with `count` labels replaced by random other ones, and the keys of these."""
    draw = np.random.default_rng(seed)
    places = draw.permutation(len(rows))[:count]
    labels = rows["label"].to_numpy().copy()
    labels[places] = (labels[places] + draw.integers(1, classes, count)) % classes
    return rows.assign(label=labels), set(rows["picture_id"].iloc[places])


def plant(
    folder: Path,
    seed: int,
    *,
    fault: str = "off by one",  # "off by one", "noise" or "" for none
    recipe: PictureRecipe = digits,
    rows: pd.DataFrame | None = None,
    first: int = 600,
    weekly: int = 40,
    wrong: int = 300,
) -> Planted:
    """Five versions on top of a first one: small deliveries, and one version with three changes, one of them at fault."""
    store = DataStore(create_workspace(folder / "w", name=recipe.name, recipe=recipe.name))
    rows = recipe.source("all") if rows is None else rows
    rows = rows.sample(frac=1.0, random_state=seed).reset_index(drop=True).assign(batch="first")
    place = 0

    def take(count: int, batch: str) -> pd.DataFrame:
        nonlocal place
        found = rows[place : place + count].assign(batch=batch)
        place += count
        return found

    def store_version() -> str:
        return store.snapshot(recipe.dataset, pd.concat(parts, ignore_index=True), **NAMES).ref

    parts = [take(first, "first")]
    refs = [store_version()]
    at = 1 + seed % 4  # which of the versions is at fault
    keys: set[str] = set()
    for number in range(1, 6):
        parts.append(take(weekly, f"week {number}"))
        if number == at:
            bad = take(wrong, "south")
            if fault == "off by one":
                keys, bad = set(bad["picture_id"]), off_by_one(bad)
            elif fault == "noise":
                bad, keys = noisy(bad, 81, seed)
            parts.append(bad)
            head = parts[0].copy()  # a few honest corrections of harmless rows
            head.loc[head.index[:3], "label"] = (head["label"].iloc[:3] + 1) % 10
            parts[0] = head
        refs.append(store_version())
    return Planted(store, refs, refs[at] if fault else "", "south" if fault else "", keys)


def search(
    folder: Path,
    seed: int,
    fault: str,
    recipe: PictureRecipe = digits,
    budget: Budget | None = None,
    **sizes: Any,
) -> tuple[Planted, Culprit]:
    """What was planted with this seed, and what is found."""
    planted = plant(folder, seed, fault=fault, recipe=recipe, **sizes)
    found = find_culprit(
        planted.store,
        recipe,
        planted.refs[0],
        planted.refs[-1],
        parameters={},
        folder=folder / "retrains",
        budget=budget,
    )
    return planted, found


def score(named: list[str], planted: set[str]) -> tuple[float, float]:
    """Precision and recall."""
    hits = len(set(named) & planted)
    return hits / max(len(named), 1), hits / max(len(planted), 1)


def recipe_named(name: str) -> Recipe:
    """A shipped recipe."""
    from mlops_workbench.recipes.protocol import load_recipe

    return load_recipe(name, Path())
