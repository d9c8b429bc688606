"""``python -m fastalign``: the same as the ``fastalign`` command."""

from .cli import main

if __name__ == "__main__":
    main()
