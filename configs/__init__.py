"""Typed, frozen recipes: what a run is, independent of where it runs."""

from configs.errors import UserError
from configs.load import load_recipe, recipe_names
from configs.recipe import Recipe

__all__ = ["Recipe", "UserError", "load_recipe", "recipe_names"]
