"""Commands of the command line, each a module with a function `main`."""
