"""Into DALI: a batch's plan as a table, the stage that puts it into a graph, and the loader."""
