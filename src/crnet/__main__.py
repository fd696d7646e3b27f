"""``python -m crnet``."""

from crnet.cli.app import main

if __name__ == "__main__":
    main()
