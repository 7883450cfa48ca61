"""Run the ``minibert`` command as ``python -m minibert``, for example with torchrun."""

from minibert.cli import main

if __name__ == "__main__":
    main()
