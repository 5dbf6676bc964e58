"""The command ``esjax``, which ``python -m esjax`` is, too."""

from esjax.runtime.pages import restart_with_large_pages


def main() -> None:
    """Run the command line."""
    restart_with_large_pages()  # before anything slow is imported
    from esjax.cli import main as run

    run()


if __name__ == "__main__":
    main()
