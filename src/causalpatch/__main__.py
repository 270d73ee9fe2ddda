"""``python -m causalpatch``: the command line, where its script is not on the path."""

from causalpatch.cli.main import main

if __name__ == "__main__":
    main()
