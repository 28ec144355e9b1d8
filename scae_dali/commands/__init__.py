"""Commands, each a module with `main`."""
