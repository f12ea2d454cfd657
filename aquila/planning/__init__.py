"""Memory, traffic and time of a training set-up, by arithmetic from shapes alone. No torch here."""
