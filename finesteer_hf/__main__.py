"""`python -m finesteer_hf`: the `finesteer` command."""

from finesteer_hf.cli import main


if __name__ == "__main__":
    main()
