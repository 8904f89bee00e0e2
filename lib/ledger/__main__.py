"""`python -m lib.ledger`."""

from lib.ledger.compute import main

main()
