"""``python -m crnet``."""

from crnet.cli.commands import main

if __name__ == "__main__":
    main()
