"""`python -m rlhf_recipes.tools.report FOLDER...` is `rlhf-recipes report FOLDER...`."""

import sys

from rlhf_recipes.tools.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
