"""The ``fastalign`` command: one file per subcommand in ``fastalign.commands``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; says what to install when the terminal libraries are missing."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"the fastalign command needs {error.name}: pip install 'fastalign[cli]'")
    from .commands import build_app

    build_app()()


if __name__ == "__main__":
    main()
