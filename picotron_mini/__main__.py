"""`python -m picotron_mini`, which is how `torchrun -m picotron_mini train ...` starts it."""

from .cli import main

if __name__ == "__main__":
    main()
