"""What ``python -m bench cpu`` measures, a file of tests per kind of case, with the candidates and rivals of each."""
