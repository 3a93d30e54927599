"""What public MagicMix programs do differently, measured. `python -m lab.audit --help` says how."""
