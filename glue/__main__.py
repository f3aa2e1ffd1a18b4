"""`python -m pgcredits` is the command line too."""

from pgcredits.cli import main

main()
