"""Pure draws: random numbers, crops, rectangles, mixing weights, schedules and orders."""
