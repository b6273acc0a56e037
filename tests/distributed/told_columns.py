"""What the rows of `told_rows` tell."""

COLUMNS = ("numbers", "squares", "drew", "of_python", "of_numpy", "of_torch", "paired")
"""`drew` counts the generators that the transforms of the row drew from; the three after it are where each of them
stands then, and `paired` is one of them times the number of the row, so that rows cannot change places unseen."""
