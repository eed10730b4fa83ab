"""`python -m crucible` is the `crucible` command."""

from crucible.cli import main

if __name__ == "__main__":
    main()
