"""`python -m lib.ledger`."""

from lib.ledger.judging import main

main()
