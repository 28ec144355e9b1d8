"""Into DALI: the plan of a batch as a table, the stage that puts it into a graph, and the loader."""
