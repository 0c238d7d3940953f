"""The commands of ``fp4compile``, one file each; ``cli.py`` registers them."""
