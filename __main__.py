"""`python -m ingot` is the command line tool `ingot`."""

from .frontends.cli.main import main

if __name__ == "__main__":
    main()
