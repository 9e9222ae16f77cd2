"""From a budget of memory to a recipe that fits."""
