"""The study as a table of steps, from which Snakemake's rules are made, and checks of that table."""
