"""``python -m minibert``: the ``minibert`` command (this form is the one to give torchrun)."""

from minibert.cli import main

if __name__ == "__main__":
    main()
