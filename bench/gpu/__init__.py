"""What ``python -m bench gpu`` measures on a card: cases, how they are compared and timed, tests before them."""
