"""The study as a table of steps: what Snakemake's rules are made of, and what checks them."""
