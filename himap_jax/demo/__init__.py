"""A page that shows an answer without and with pruning, what each costs, and the patches that remain."""
