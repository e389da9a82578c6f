"""`python -m samed_peft` is `samed`."""

from samed_peft.cli import main

if __name__ == "__main__":
    main()
