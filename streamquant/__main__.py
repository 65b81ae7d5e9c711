"""`python -m streamquant`: the command line."""

from streamquant.cli import main

main(prog_name="streamquant")
