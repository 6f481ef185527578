"""`python -m lrm` is `lrm`."""

from lrm.cli import main

if __name__ == "__main__":
    main()
