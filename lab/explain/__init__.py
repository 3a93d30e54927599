"""Look inside a mix: a trace of every step, and a page that shows it. `python -m lab.explain --help` says how."""
